"""Everything that a user does with a model on a CUDA device; skipped where there is none."""

import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from pyro_sparse import compact, data, export, guides, infer, likelihoods, models, nets
from pyro_sparse.infer import ELBO, fit, make_fabric
from pyro_sparse.modules import own_parameters
from pyro_sparse.posterior import MedianProbability, Posterior, TopK, importance
from pyro_sparse.precision import full_precision
from pyro_sparse.runs import experiment
from pyro_sparse.runs.cli import main
from pyro_sparse.runs.zoo import ZOO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Drivers and cuDNN warn of what the machine is, not of what the package does.
    pytest.mark.filterwarnings("default"),
]

CUDA = torch.device("cuda")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ZOO_MODELS = sorted({entry.model for entry in ZOO.values()})


def problem(kind):
    """A network, inputs and labels that follow from them."""
    torch.manual_seed(3)
    if kind == "mlp":
        x = torch.randn(256, 6)
        return nets.mlp([6, 16, 12, 2]), x, (x[:, 0] + x[:, 1] > 0).long()
    size = 16 if kind == "lenet" else 8
    x = torch.randn(256, 1, size, size)
    y = (x[:, 0, :4, :4].mean((1, 2)) > 0).long()
    if kind == "lenet":
        return nets.lenet5_caffe(widths=(4, 6, 16), classes=2, size=size), x, y
    if kind == "vit":
        small = {"size": size, "width": 12, "depth": 1, "heads": 3, "hidden": 8}
        return nets.vit(in_channels=1, classes=2, **small), x, y
    return nets.resnet(8, widths=(4, 6, 8), classes=2, in_channels=1), x, y


KINDS = ("mlp", "lenet", "resnet", "vit")


def built(kind, name="SpikeSlabGroupLasso", device=CUDA, **options):
    """Model and guide of a network that lies on ``device``, with its data on the CPU."""
    net, x, y = problem(kind)
    model = getattr(models, name)(net.to(device), x[:2].to(device), num_data=len(x), **options)
    return model, guides.for_model(model), x, y


def half(model, seed=0):
    """About half of the units of every prunable layer, at least one."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in model.layers:
        if group.prunable:
            mask = torch.rand(group.size, generator=generator) < 0.5
            mask[0] = True
            masks[group.name] = mask
    return masks


def train(model, guide, x, y, *, precision="32-true", epochs=3, batch=64, **options):
    return fit(
        *(model, guide, data.Batches(x, y, batch, seed=1)),
        epochs=epochs,
        progress=False,
        fabric=make_fabric(accelerator="gpu", precision=precision),
        **options,
    )


def devices(*modules):
    return {value.device.type for module in modules for value in module.state_dict().values()}


# -- a model on the device -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_lies_where_its_network_does(kind):
    model, guide, _, _ = built(kind)
    assert devices(model) == {"cuda"}
    assert {value.device.type for value in guide.parameters()} == {"cuda"}


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("name", ZOO_MODELS)
def test_a_step_of_every_model(name, kind):
    model, guide, x, y = built(kind, name)
    for local in (True, False):
        guide.zero_grad()
        with own_parameters(model, guide):
            elbo = ELBO(local_reparameterisation=local)
            estimate = elbo.estimate(model, guide, x[:32].to(CUDA), y[:32].to(CUDA))
        estimate.loss.backward()
        assert bool(estimate.loss.isfinite())
        for key, parameter in guide.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.device.type == "cuda"
            assert bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", ZOO_MODELS)
def test_the_kl_is_that_of_the_cpu(name):
    """In float64, to rounding."""
    found = []
    for device in ("cpu", CUDA):
        net, x, y = problem("mlp")
        model = getattr(models, name)(
            net.double().to(device), x[:2].double().to(device), num_data=len(x)
        )
        guide = guides.for_model(model)
        torch.manual_seed(0)
        with own_parameters(model, guide):
            estimate = ELBO(20, local_reparameterisation=False).estimate(
                model, guide, x.double().to(device), y.to(device)
            )
        assert estimate.kl.dtype == torch.float64
        found.append(float(estimate.kl))
    # The KL of scales depends on draws, which differ between devices.
    assert found[1] == pytest.approx(found[0], rel=0.05, abs=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype):
    net, x, y = problem("lenet")
    model = models.SpikeSlabGroupHorseshoe(
        net.to(CUDA, dtype), x[:2].to(CUDA, dtype), num_data=len(x)
    )
    guide = guides.for_model(model)
    train(model, guide, x.to(dtype), y, epochs=1)
    posterior, keep = Posterior(model, guide), half(model)
    small, inputs = compact(posterior, keep), x[:32].to(dtype)
    assert {value.dtype for value in small.parameters()} == {dtype}
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    with torch.no_grad():
        difference = (posterior.masked(inputs, keep) - small(inputs)).abs().max()
    assert float(difference) <= tolerance


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["mlp", "lenet"])
def test_a_fit(kind, precision):
    model, guide, x, y = built(kind, device="cpu")
    x, y = x.to(CUDA), y.to(CUDA)
    run = train(model, guide, x, y, precision=precision, epochs=30, lr=0.01, validation=(x, y))
    assert devices(model, guide) == {"cuda"}
    assert {value.dtype for value in guide.parameters()} == {torch.float32}
    assert all(math.isfinite(entry["loss"]) for entry in run.history)
    assert run.history[-1]["log_likelihood_per_datum"] > run.history[0]["log_likelihood_per_datum"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", infer.OPTIMIZERS)
def test_a_fit_with_a_clipped_gradient(optimizer, precision):
    model, guide, x, y = built("resnet")
    run = train(
        *(model, guide, x, y),
        precision=precision,
        clip_norm=1.0,
        optimizer=infer.OPTIMIZERS[optimizer],
    )
    assert all(math.isfinite(entry["loss"]) for entry in run.history)


def test_targets_are_not_rounded():
    """Autocast is for the network, and not for the numbers that it is to predict."""
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    seen = []

    class Spy(likelihoods.Normal):
        def forward(self, output, y, num_data):
            seen.append(y)
            return super().forward(output, y, num_data)

    model = models.SpikeSlabGaussian(
        nets.mlp([3, 4, 1]).to(CUDA), x[:2].to(CUDA), likelihood=Spy(), num_data=64
    )
    y = torch.randn(64)
    train(model, guides.for_model(model), x, y, precision="bf16-mixed", epochs=1)
    assert torch.equal(seen[-1].cpu().sort().values, y.sort().values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on(precision, tmp_path):
    """It ends where one ends that was never stopped: same batches, same noise on the device."""
    outcomes = []
    for folder, stops in (("whole", []), ("stopped", [2])):
        for epochs in (*stops, 4):
            torch.manual_seed(len(outcomes) + epochs)  # the caller's own state has no part in it
            model, guide, x, y = built("mlp", device="cpu")

            def stop(metrics, last=epochs):
                if metrics["epoch"] > last:
                    raise KeyboardInterrupt

            options = {"out": tmp_path / folder, "resume": bool(stops), "on_epoch": stop}
            try:
                train(model, guide, x, y, precision=precision, epochs=4, lr=0.01, **options)
            except KeyboardInterrupt:
                continue
        outcomes.append({name: value.cpu() for name, value in guide.named_parameters()})
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_retries_go_back(tmp_path):
    """Optimiser and random states come back to the device."""
    model, guide, x, y = built("mlp")

    class Faulty(data.Batches):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            for x, y in super().__iter__():
                yield (x * math.inf if self.epoch == 2 else x), y

    run = fit(
        *(model, guide, Faulty(x, y, 64)),
        epochs=3,
        retries=1,
        progress=False,
        fabric=make_fabric(accelerator="gpu"),
        out=tmp_path / "run",
    )
    assert len(run.history[1]["retries"]) == 1
    assert all(math.isfinite(entry["loss"]) for entry in run.history)


def test_augmentation_on_the_device():
    """The order, the places and the mirrored images are those of the CPU."""
    x = torch.rand(64, 3, 8, 8)
    y = torch.arange(64)
    found = []
    for device in ("cpu", CUDA):
        batches = data.Batches(
            x.to(device), y.to(device), 16, seed=4, augment=data.crop_and_flip(2)
        )
        parts = [(a.cpu(), b.cpu()) for a, b in batches]
        found.append([torch.cat(part) for part in zip(*parts, strict=True)])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0])


# -- the posterior -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["SpikeSlabGroupHorseshoe", "LogNormalNoise"])
def test_what_a_posterior_is_asked(name, kind, where):
    """With the data on either side; masks are on the CPU, predictions where the inputs are."""
    model, guide, x, y = built(kind, name)
    x, y = x[:64].to(where), y[:64].to(where)
    posterior = Posterior(model, guide, x)
    draws = posterior.predict(x, num_samples=2)
    assert draws.device.type == where
    assert draws.shape == (2, 64, 2)
    posterior.refresh_statistics()
    assert posterior.masked(x).device.type == where
    assert {mask.device.type for mask in posterior.keep().values()} == {"cpu"}
    assert 0 <= posterior.evaluate(x, y, num_samples=2)["accuracy_ensemble"] <= 1
    assert posterior.calibration(x, y, num_samples=2).keys() == {"ensemble", "compact"}
    assert posterior.summary().groups
    if name == "SpikeSlabGroupHorseshoe":
        assert str(posterior.contraction(num_samples=3))
    posterior.radius(x, num_samples=3)
    assert posterior.prune(TopK(importance.magnitude, 0.5)) > 0
    assert bool(posterior.predict(x, num_samples=1).isfinite().all())
    assert posterior.masked(x).shape == (64, 2)


def test_diagnostics():
    model, guide, x, y = built("mlp", "SpikeSlabGaussian")
    assert math.isfinite(Posterior(model, guide).khat(x, y, num_samples=30, blocks={}).joint)
    assert infer.gradient_variance(model, guide, x[:32].to(CUDA), y[:32].to(CUDA)).total > 0
    assert math.isfinite(infer.lower_bound(model, guide, data.Batches(x, y, 64), draws=2).value)
    Posterior(model, guide).to_arviz(x[:8], y[:8], num_samples=3)


# -- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_compact_equals_masked(kind, tmp_path):
    model, guide, x, y = built(kind)
    train(model, guide, x, y, epochs=1)
    posterior = Posterior(model, guide, x)
    for seed in range(3):
        keep = half(model, seed)
        posterior.refresh_statistics(keep)
        small = compact(posterior, keep)
        assert devices(small) == {"cpu"}
        for inputs in (x, x[:1], x[:3].to(CUDA)):
            with torch.no_grad():
                difference = (posterior.masked(inputs, keep).cpu() - small(inputs.cpu())).abs()
            assert float(difference.max()) <= 1e-5
    drawn = export.compact_draws(posterior, keep, draws=2)
    assert devices(drawn) == {"cpu"}
    export.save(small, tmp_path / "small", pt2=True, dense=problem(kind)[0], example=x[:4])
    with torch.no_grad():
        torch.testing.assert_close(export.load(tmp_path / "small")(x[:5]), small(x[:5]))
    # A network on the device can be saved, too: what is written lies on the CPU.
    export.save(small.to(CUDA), tmp_path / "moved", example=x[:4].to(CUDA))
    assert devices(export.load(tmp_path / "moved")) == {"cpu"}


def test_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, guide, x, _ = built("lenet")
    small = compact(Posterior(model, guide), half(model))
    export.save(small, tmp_path / "small", onnx=True, example=x[:4])
    assert (tmp_path / "small" / "model.onnx").is_file()
    dense = problem("lenet")[0].to(CUDA)
    result = export.bench(dense, small, x[:1].to(CUDA), batches=(1,), seconds=0.2)
    assert result.mac_ratio > 1


def test_convolutions_are_those_of_float32():
    """TF32, which convolutions take by default, would be wrong by 1e-3."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 16, 3), torch.randn(8, 16, 12, 12)
    before = torch.backends.cudnn.allow_tf32
    with torch.no_grad(), full_precision(CUDA):
        exact = layer.double()(x.double())
        found = layer.float().to(CUDA)(x.to(CUDA)).cpu()
    assert float((found - exact).abs().max()) < 1e-5
    assert torch.backends.cudnn.allow_tf32 == before


# -- run folders and the command line --------------------------------------------------------------


def succeed(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_command_line(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    succeed(
        *("fit", "ss-gl", "--data", "digits", "--net", "mlp:16", "--epochs", 4, "--quiet"),
        *("--inclusion-lr", 1e-4, "--accelerator", "gpu", "--precision", "bf16-mixed"),
        *("--out", run),
    )
    assert (run / "report.html").is_file()
    assert "accuracy" in succeed("analyse", run, "--draws", 5)
    succeed("export", run, "--out", out, "--draws", 2)
    succeed("bench", out, "--batches", 1, "--seconds", 0.2)
    assert (out / "bench.json").is_file()
    summary = infer.read_json(run / "summary.json")
    assert summary["max_abs_diff_masked_compact"] <= 1e-5
    _, dataset, posterior = experiment.load(run)
    assert posterior.keep(MedianProbability())
    assert posterior.masked(dataset.test.x[:4]).shape == (4, 10)
