"""The command line: one thin command a verb."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_sparse.names import AUTOGUIDES, OPTIMIZERS, PRECISIONS, SCHEDULES
from pyro_sparse.runs.zoo import ZOO

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

# torch and Pyro are imported inside the commands: --help and zoo answer at once.


ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, ModuleNotFoundError)


class _Group(click.Group):
    """Errors that say what to do go to the terminal as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ERRORS as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as error:
            # Training that was asked to stop says where it did, and by which signal; once.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                click.echo(str(error) or "stopped", err=True)
            ctx.exit(getattr(error, "exit_code", 130))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pyro-sparse")
def main() -> None:
    """Structurally sparse Bayesian neural networks: train, compare, prune, ship.

    \b
    Start with
        pyro-sparse compare ss-ig ss-gl ss-ghs --data digits
    which trains three sparse models and a dense baseline on embedded data, and
    prints what each keeps and how good its pruned network is.
    """


class _Value(click.ParamType):
    """A value of an option that a constructor takes."""

    name = "value"

    def __init__(self, option: Any) -> None:
        self.option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pyro_sparse.runs.options import parse_value

        try:
            return parse_value(self.option.hint, value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"expected {error}, got {value!r}", param, ctx)


_OF_MODELS = "pyro_sparse.options_of_models"
"""Where a command's context keeps the options of its models."""


class _WithModels(click.Command):
    """A command with the options of the models that its line names, and of their guides.

    What they take is read from their constructors (`pyro_sparse.runs.options`), for which torch is
    imported; a line without a model answers at once.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_OF_MODELS] = self._of_models(args)
        return super().parse_args(ctx, args)

    def _of_models(self, args: list[str]) -> list[click.Option]:
        entries = [ZOO[head] for word in args if (head := word.partition(":")[0]) in ZOO]
        words = [part for word in args for part in word.split("=", 1)]
        guide = words[words.index("--guide") + 1] if "--guide" in words[:-1] else "matched"
        taken = {option for one in self.params for option in one.opts}
        found: dict[str, click.Option] = {}
        if not entries:
            return []
        from pyro_sparse.runs import options

        for entry in entries:
            for of in (options.of_model(entry), options.of_guide(guide, entry)):
                for name, one in of.known.items():
                    flag = f"--{name.replace('_', '-')}"
                    if name in found or flag in taken:
                        continue
                    default = entry.settings.get(name, one.default)
                    known = f"[default: {default}]" if one.has_default else ""
                    text = f"{one.text}. {known}" if one.text else known
                    found[name] = (
                        click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=text)
                        if one.hint is bool
                        else click.Option([flag, name], type=_Value(one), help=text)
                    )
        return list(found.values())

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_OF_MODELS, [])]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        of_models = ctx.meta.pop(_OF_MODELS, [])
        super().format_options(ctx, formatter)
        with formatter.section("Options of the model and its guide"):
            if of_models:
                formatter.write_dl([one.get_help_record(ctx) for one in of_models])
            else:
                formatter.write_text(
                    f"Name a model to see them: pyro-sparse {self.name} ss-ghs --help"
                )


def _training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `fit` and `compare` share."""
    options = [
        click.option(
            "--data",
            required=True,
            metavar="NAME",
            help="digits or diabetes (embedded), mnist, fashion-mnist, cifar10, uci:NAME, "
            "csv:FILE, parquet:FILE, folder:DIR.",
        ),
        click.option(
            "--target",
            metavar="COLUMN",
            help="Of a table: the column to predict. [default: the first one if it is called y, "
            "target, label or the like, else the last one]",
        ),
        click.option(
            "--task",
            type=click.Choice(["classification", "regression"]),
            help="Of a table. [default: classification for text, two values, and whole numbers "
            "that look like labels]",
        ),
        click.option(
            "--drop",
            metavar="COLUMN",
            multiple=True,
            help="Of a table: leave out; may be repeated.",
        ),
        click.option(
            "--missing",
            type=click.Choice(["impute", "refuse"]),
            help="Of a table: fill missing values with the median and mark them, or refuse them. "
            "[default: impute]",
        ),
        click.option(
            "--data-root",
            type=click.Path(file_okay=False, path_type=Path),
            envvar="PYRO_SPARSE_DATA",
            help="Folder that holds the files of data sets that are not embedded: torchvision's "
            "layout, or uci/NAME. [env: PYRO_SPARSE_DATA]",
        ),
        click.option(
            "--download", is_flag=True, help="Fetch a torchvision data set that is missing."
        ),
        click.option(
            "--split", default=0, show_default=True, help="Which split, where a set has several."
        ),
        click.option(
            "--validation",
            default=0.05,
            show_default=True,
            help="Share of the training set held out for the validation curve.",
        ),
        click.option(
            "--net",
            metavar="NAME",
            help="mlp:400-400, lenet5-caffe, vgg, resnet20 (32, 56; resnet20-b), vit or "
            "package.module:factory. [default: by size of data]",
        ),
        click.option(
            "--augment/--no-augment",
            default=None,
            help="Shift and mirror training images at random. [default: by size of data]",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(OPTIMIZERS),
            help="sgd has momentum 0.9. [default: by size of data]",
        ),
        click.option(
            "--epochs",
            type=click.IntRange(1),
            help="Passes over the data. [default: by size of data]",
        ),
        click.option("--batch-size", type=click.IntRange(1), help="[default: by size of data]"),
        click.option("--lr", type=float, help="Learning rate of the weights."),
        click.option("--inclusion-lr", type=float, help="Learning rate of the inclusion logits."),
        click.option("--scale-lr", type=float, help="Learning rate of scales and precisions."),
        click.option(
            "--schedule",
            type=click.Choice(SCHEDULES),
            help="How the learning rates fall.",
        ),
        click.option(
            "--lr-hold", type=click.FloatRange(0, 1), help="Share of training before they do."
        ),
        click.option(
            "--inclusion-start",
            type=click.FloatRange(0, 1),
            help="Share of training before the inclusion logits move.",
        ),
        click.option(
            "--inclusion-rise",
            type=click.FloatRange(0, 1),
            help="Share of training over which their rate then rises.",
        ),
        click.option(
            "--inclusion-hold",
            type=click.FloatRange(0, 1),
            help="Share of training before the inclusion logits' rate falls.",
        ),
        click.option(
            "--inclusion-stop",
            type=click.FloatRange(0, 1),
            help="Share of training after which inclusions stay as they are; 1: never.",
        ),
        click.option(
            "--kl-start",
            type=click.FloatRange(0),
            help="The KL's weight at first; 1 is the paper's objective throughout.",
        ),
        click.option(
            "--kl-hold", type=click.FloatRange(0, 1), help="Share of training at that weight."
        ),
        click.option(
            "--kl-rise",
            type=click.FloatRange(0, 1),
            help="Share of training over which it then goes to 1.",
        ),
        click.option("--clip-norm", type=float, help="Largest norm of the gradient."),
        click.option("--num-particles", type=click.IntRange(1), help="Draws of the guide a step."),
        click.option(
            "--guide",
            metavar="|".join(["matched", *AUTOGUIDES, "package.module:Class"]),
            help="The model's own guide; one of Pyro's autoguides where all latents are "
            "continuous, to compare with; or one of your own. [default: matched]",
        ),
        click.option(
            "--noise-rate",
            type=click.FloatRange(0, min_open=True),
            help="Of regressions: rate of the prior Gamma(1, rate) of the noise precision; smaller "
            "where errors are below a tenth of the target's standard deviation. [default: 1]",
        ),
        click.option(
            "--ensemble-temperature",
            metavar="VALIDATION|NUMBER",
            type=lambda value: value if value == "validation" else float(value),
            help="Of the ensemble's class probabilities: fitted on validation rows, or a number; "
            "1 is the posterior's own. [default: validation]",
        ),
        click.option(
            "--pretrain",
            type=click.IntRange(0),
            help="Epochs of training the dense network that the model starts from.",
        ),
        click.option(
            "--rule",
            help="Which units are kept: median:γ, snr:t, bmrs-n:ω, bmrs-u4:ω, bmrs-u8:ω, "
            "macs:N:MEASURE or top:K:MEASURE. [default: the model's]",
        ),
        click.option(
            "--budget",
            type=click.FloatRange(0, min_open=True),
            help="MACs that magnitude, random and shapley may keep, or below 1 the share of the "
            "dense network's. [default: in compare what the other models keep, else 0.1]",
        ),
        click.option(
            "--passes",
            type=click.IntRange(0),
            help="How often, at most, to prune and train on after training.",
        ),
        click.option(
            "--retrain",
            type=click.FloatRange(0, 1, min_open=True),
            help="Epochs of training after each pass, as a share of --epochs.",
        ),
        click.option(
            "--prune-every",
            type=click.IntRange(0),
            help="Prune for good every so many epochs in the midst of training.",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="Of the network's forward pass; with mixed, all else is in 32 bits.",
        ),
        click.option(
            "--retries",
            type=click.IntRange(0),
            help="How often training may go back to the last good epoch, with half the learning "
            "rates, when something is no longer finite.",
        ),
        click.option("--seed", default=0, show_default=True, help="Of everything random."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_seeds_option = click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="How many runs of each model, with seeds that count up from --seed.",
)


def _split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides a run, and what only says where things lie."""
    places = {key: options.pop(key) for key in ("data_root", "download", "quiet")}
    options["drop"] = list(options["drop"]) or None
    return options, places


@main.command()
def zoo() -> None:
    """List the models: paper, prior, guide, rule, and when to use each."""
    for entry in ZOO.values():
        click.secho(f"{entry.name:<11}", bold=True, nl=False)
        click.echo(entry.title)
        for label, text in (
            ("paper", entry.paper),
            ("prior", entry.prior),
            ("guide", entry.guide),
            ("keeps", entry.rule),
            ("use it", f"when {entry.use}"),
        ):
            click.echo(f"           {label:<7} {text}")


@main.command(cls=_WithModels)
@click.argument("model", metavar="MODEL")
@_training_options
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Run folder."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --out, with the options it was begun with.",
)
@click.option(
    "--devices",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many, of each machine; each has its share of every batch.",
)
@click.option(
    "--accelerator",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="What kind.",
)
@click.option(
    "--strategy",
    default="auto",
    show_default=True,
    help="How Lightning Fabric shares the work: ddp (auto's choice for several devices), or "
    "another one of its names.",
)
@click.option(
    "--num-nodes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Machines. Start the command on each, as with torchrun.",
)
@_seeds_option
def fit(
    model: str,
    out: Path,
    resume: bool,
    seeds: int,
    devices: int,
    accelerator: str,
    strategy: str,
    num_nodes: int,
    **options: Any,
) -> None:
    """Train MODEL (a name from `pyro-sparse zoo`) and write a run folder.

    \b
    The folder holds config.json, metrics.jsonl (a line an epoch), checkpoint/,
    summary.json, figures/ and report.html; with several seeds there is one under
    each of DIR/seed-0, DIR/seed-1, ... Ship the pruned network with
        pyro-sparse export RUN --out DIR
    A run that was stopped, by Ctrl-C or otherwise, goes on with --resume.

    \b
    Example:
        pyro-sparse fit ss-ghs --data mnist --data-root DATA --out runs/mnist
    Several devices, here and on two machines:
        pyro-sparse fit ... --devices 2
        torchrun --nnodes 2 --nproc-per-node 4 --rdzv-endpoint HOST:29500 \\
            --no-python pyro-sparse fit ... --devices 4 --num-nodes 2
    """
    settings, places = _split_options(options)
    from pyro_sparse import infer
    from pyro_sparse.runs import experiment, table, terminal

    chosen = experiment.settings_for(
        model, settings.pop("data"), root=places["data_root"], strict=True, **settings
    )
    fabric = infer.make_fabric(
        devices=devices,
        accelerator=accelerator,
        strategy=strategy,
        num_nodes=num_nodes,
        precision=chosen.precision,
    )
    if seeds > 1:
        from pyro_sparse.runs import comparison

        summaries = comparison.run_seeds(
            chosen,
            out,
            seeds,
            root=places["data_root"],
            download=places["download"],
            fabric=fabric,
            resume=resume,
            progress=not places["quiet"],
            on_data=terminal.print_data if fabric.is_global_zero else None,
        )
        if fabric.is_global_zero:
            terminal.print_comparison(chosen.data, table.tabulate(summaries))
            click.echo(
                f"\nrun folders: {out}/seed-*, all in {out / 'report.html'}; merge them with "
                f"pyro-sparse analyse {out}"
            )
        return
    dataset = experiment.load_data(chosen, places["data_root"], places["download"])
    if fabric.is_global_zero:
        terminal.print_data(dataset)
    summary = experiment.run(
        chosen, out, dataset=dataset, resume=resume, progress=not places["quiet"], fabric=fabric
    )
    if fabric.is_global_zero:
        terminal.print_comparison(chosen.data, table.tabulate([summary]))
        terminal.print_result(summary)
        click.echo(f"\nrun folder: {out}")


@main.command(cls=_WithModels)
@click.argument("models", metavar="MODELS...", nargs=-1, required=True)
@_training_options
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the run folders, compare.json, .csv, .tex and report.html. [default: a new "
    "one under runs/]",
)
@click.option(
    "--baseline",
    metavar="MODEL",
    help="The entry that the others are tested against. [default: the first]",
)
@click.option(
    "--measure/--no-measure",
    "measured",
    default=True,
    show_default=True,
    help="Add evidence bounds, k-hat, gradient variance and latency, some seconds a run.",
)
@click.option(
    "--jobs",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Runs at a time, each in a process of its own on one thread; at most as many as there "
    "are cores.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the comparison in --out, or add models or seeds to it; the same options.",
)
@_seeds_option
def compare(
    models: tuple[str, ...],
    out: Path | None,
    resume: bool,
    seeds: int,
    baseline: str | None,
    measured: bool,
    jobs: int,
    **options: Any,
) -> None:
    """Train MODELS and the dense baseline on the same data; print them side by side.

    \b
    A model may have settings of its own, so that guides can be compared:
        pyro-sparse compare ss-ghs ss-ghs:variance=full --data digits
        pyro-sparse compare ss-ig:inclusion=score,num-particles=4 ss-ig --data digits
    With several seeds the tables have means, standard errors and paired tests.

    \b
    The tables have, for each model, accuracy or RMSE of the ensemble of posterior
    draws and of the compact network one would ship, negative log-likelihood,
    calibration error, units kept a layer, units that are undecided
    (0.05 < inclusion probability < 0.95), parameters, MACs, latency, seconds,
    evidence bounds, k-hat, and the variance of the gradient.

    \b
    Example:
        pyro-sparse compare ss-ig ss-gl ss-ghs --data digits
    """
    settings, places = _split_options(options)
    names = [*dict.fromkeys(models), *(["dense"] if "dense" not in models else [])]
    from pyro_sparse.runs import comparison, terminal

    if resume and out is None:
        raise ValueError("--resume needs --out, the folder of the comparison to go on with")
    data = settings.pop("data")
    out = out or terminal.new_folder(Path("runs"), f"compare-{data.replace(':', '-')}")
    result = comparison.compare(
        names,
        data,
        out,
        seeds=seeds,
        baseline=baseline,
        measured=measured,
        jobs=jobs,
        root=places["data_root"],
        download=places["download"],
        resume=resume,
        progress=not places["quiet"],
        on_data=terminal.print_data,
        **settings,
    )
    terminal.print_comparison(data, result.table)
    for summary in result.runs:
        if summary.get("said"):
            click.echo(f"{summary['entry']}: {summary['said']}")
        for caution in summary.get("cautions", []):
            click.echo(f"{summary['entry']}, seed {summary['seed']}: {caution}")
    click.echo(f"\nrun folders, tables and report.html: {out}")


# What several commands take.
_trust = click.option(
    "--trust",
    is_flag=True,
    help="The run names a network or guide package.module:factory: import it and call it.",
)
_data_root = click.option(
    "--data-root",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="PYRO_SPARSE_DATA",
    help="As for fit.",
)
_checkpoint = click.option(
    "--checkpoint",
    type=click.Choice(["last", "best"]),
    default="last",
    show_default=True,
    help="Of the last epoch, or of the one with the best evidence lower bound on validation data.",
)


@main.command()
@click.argument(
    "runs",
    metavar="RUNS...",
    nargs=-1,
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--draws",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Draws of the posterior ensemble.",
)
@click.option(
    "--members",
    default=10,
    show_default=True,
    type=click.IntRange(1),
    help="Compact networks drawn from the posterior, as export --draws ships them.",
)
@click.option(
    "--outside",
    metavar="NAME",
    help="Another data set with inputs of the same shape: how well uncertainty tells them apart.",
)
@_checkpoint
@_data_root
@_trust
def analyse(runs: tuple[Path, ...], data_root: Path | None, **options: Any) -> None:
    """Say what the posterior of a run folder knows, and how far to believe it.

    \b
    Prints units with their uncertainty; scores and calibration of the ensemble,
    the compact network and several compact draws; coverage of predictive
    intervals; and the compact network at other sizes. Writes analysis.json and
    figures into RUN, and brings report.html up to date.

    \b
    Several runs of one model, or the folder that fit --seeds has written, are
    merged: inclusion probabilities with their spread over seeds, hidden units
    matched, and scores of all draws together. Writes seeds.json, figures and
    report.html into the folder that holds them.

    \b
    Example:
        pyro-sparse analyse runs/mnist --outside fashion-mnist
        pyro-sparse analyse runs/digits-seeds
    """
    from pyro_sparse.runs import analysis, terminal

    folders = analysis.seed_folders(runs)
    if len(folders) > 1:
        out = runs[0] if len(runs) == 1 else runs[0].parent
        terminal.print_seeds(
            analysis.analyse_seeds(
                folders, out, root=data_root, draws=options["draws"], trust=options["trust"]
            )
        )
        click.echo(f"{out / 'seeds.json'} and {out / 'report.html'}")
        return
    (run,) = folders
    terminal.print_analysis(analysis.analyse(run, root=data_root, **options))
    click.echo(f"{run / 'analysis.json'} and {run / 'report.html'}")


@main.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="New folder."
)
@click.option(
    "--rule",
    help="Which units are kept, see fit --rule. [default: the run's]",
)
@click.option("--onnx", is_flag=True, help="Write model.onnx, too (extra: pyro-sparse[onnx]).")
@click.option(
    "--int8",
    is_flag=True,
    help="Write model.onnx and model-int8.onnx, quantised with ranges of training inputs.",
)
@click.option("--pt2", is_flag=True, hidden=True, help="Always written.")
@click.option(
    "--draws",
    type=click.IntRange(1),
    help="Export this many networks drawn from the posterior, all with the kept units, instead of "
    "one at its means.",
)
@click.option(
    "--dense",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="RUN",
    help="Run of the dense baseline, for the model card. [default: RUN/../dense, if there is one]",
)
@click.option(
    "--bench/--no-bench",
    "measure",
    default=True,
    show_default=True,
    help="Measure latency for the model card, a few seconds.",
)
@_checkpoint
@click.option(
    "--data-root",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="PYRO_SPARSE_DATA",
    help="As for fit; the run's data set tells the input's shape and scaling.",
)
@_trust
def export(run: Path, out: Path, data_root: Path | None, measure: bool, **options: Any) -> None:
    """Prune the network of a run folder and write it as a plain torch network.

    \b
    The new folder needs neither Pyro nor this package:
        README.md          model card: scores, size, speed, how to load it
        config.json        architecture, kept units, preprocessing
        model.pt2          for torch.export.load, checked against the network
        model.safetensors  weights by the network's own names
        model.onnx, model-int8.onnx   on request, likewise

    \b
    Example:
        pyro-sparse export runs/mnist --out small --int8
    """
    from pyro_sparse.runs import deployment

    options["draws"] = options["draws"] or 0
    del options["pt2"]
    done = deployment.write_export(run, out, root=data_root, **options)
    kept = ", ".join(f"{name} {count}" for name, count in done["kept"].items())
    click.echo(f"{done['model']}: kept {kept}")
    click.echo(
        f"{done['parameters']:,} parameters, {done['macs']:,} MACs; "
        f"masked against compact: {done['max_abs_diff_masked_compact']:.1e}"
    )
    if measure:
        deployment.bench(out, seconds=1.0)
    click.echo(f"{out}: torch.export.load('{out / 'model.pt2'}').module(); see README.md")


@main.command()
@click.argument("folder", metavar="RUN_OR_EXPORT", type=click.Path(path_type=Path))
@click.argument("rows", metavar="ROWS", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File. [default: print them]"
)
@click.option(
    "--draws",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Of a run's posterior; an exported folder has its own.",
)
@_data_root
@_trust
def predict(
    folder: Path, rows: Path, out: Path | None, data_root: Path | None, **options: Any
) -> None:
    """Predict raw rows of a table: probabilities of classes, or numbers with 95 % intervals.

    \b
    ROWS is a table as fit takes it (CSV, or Parquet by its suffix), without scaling
    or coding; columns are found by name, and the target's need not be there. Prints
    CSV: prediction, and p(LABEL) of every class or low and high.

    \b
    Example:
        pyro-sparse predict small new-patients.csv --out predicted.csv
    """
    from pyro_sparse.runs import prediction

    found, notes = prediction.predict(folder, rows, root=data_root, **options)
    for note in notes:
        click.echo(note, err=True)
    text = prediction.as_text(found)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text)


def _numbers(value: str) -> tuple[int, ...]:
    """Parses ``1,16,256``."""
    return tuple(int(part) for part in value.split(","))


@main.command()
@click.argument("folder", metavar="RUN_OR_EXPORT", type=click.Path(path_type=Path))
@click.option(
    "--batches",
    default="1,16,256",
    show_default=True,
    type=_numbers,
    metavar="N,N,...",
    help="Batch sizes.",
)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(1, os.cpu_count()),
    help="Of each runtime; at most as many as there are cores.",
)
@click.option("--seconds", default=5.0, show_default=True, help="Time for each batch size.")
@click.option(
    "--data-root",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="PYRO_SPARSE_DATA",
    help="As for fit; a run needs its data set, an exported folder does not.",
)
@_trust
def bench(folder: Path, data_root: Path | None, **options: Any) -> None:
    """Time the compact network beside the dense one, in torch and in ONNX Runtime.

    \b
    Takes a run folder or an exported one, and writes bench.json and bench.png
    into it; an exported folder's model card is brought up to date. All four are
    timed in turns in one process. ONNX Runtime comes with pyro-sparse[onnx].

    \b
    Example:
        pyro-sparse bench small
    """
    from pyro_sparse.runs import deployment, terminal

    result = deployment.bench(folder, root=data_root, **options)
    terminal.print_bench(result)
    if len(result.versions) == 1:
        click.echo("ONNX Runtime is not installed: pip install 'pyro-sparse[onnx]'")
    click.echo(f"\n{folder / 'bench.json'} and {folder / 'bench.png'}")


@main.command()
@click.option("--net", required=True, metavar="NAME", help="As for fit.")
@click.option(
    "--input",
    "shape",
    default="3x32x32",
    show_default=True,
    help="Shape of one input, such as 784 or 3x32x32.",
)
@click.option("--outputs", default=10, show_default=True, help="Classes, or numbers predicted.")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the groups there."
)
def explain(net: str, shape: str, outputs: int, picture: Path | None) -> None:
    """List the groups of a network: what can be removed together, and what cannot and why.

    \b
    Example:
        pyro-sparse explain --net resnet20 --input 3x32x32
    """
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"expected a shape such as 784 or 3x32x32, got {shape!r}")
    import torch

    from pyro_sparse import graph, nets

    inputs = tuple(map(int, sizes))
    found = graph.groups(nets.build(net, inputs, outputs), torch.zeros(2, *inputs))
    click.echo(found.explain())
    if picture is not None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1 + 0.28 * len(found)), layout="constrained")
        FigureCanvasAgg(figure)
        graph.draw(found, figure.subplots())
        figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
