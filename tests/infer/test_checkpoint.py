"""Checkpoints: what is kept, what is refused, and what a failed write leaves behind."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_sparse import guides, models, nets
from pyro_sparse.data import Batches
from pyro_sparse.infer import checkpoint, checkpoint_file, save_checkpoint
from pyro_sparse.infer.checkpoint import load_checkpoint


class Killed(Exception):
    pass


@pytest.fixture
def folder(tiny, tmp_path):
    """Of a run of two epochs that was killed after the first."""

    def kill(metrics):
        if metrics["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        tiny.train(*tiny.problem(), out=tmp_path, epochs=2, on_epoch=kill)
    return tmp_path


class TestRefused:
    """All before any training: the guide is as it was."""

    @pytest.fixture
    def refused(self, tiny, folder):
        def resume(match: str, name: str = "ss-ig", **options) -> None:
            model, guide = tiny.problem(name, **options)
            untouched = tiny.state(guide)
            with pytest.raises(ValueError, match=match):
                tiny.train(model, guide, out=folder, resume=True, epochs=2)
            tiny.assert_equal(tiny.state(guide), untouched)

        return resume

    @pytest.mark.parametrize("size", [0, 5, 200, -8])
    def test_truncated(self, folder, size, refused):
        file = checkpoint_file(folder)
        file.write_bytes(file.read_bytes()[:size])
        refused(r"last.safetensors is damaged or no checkpoint.*best.safetensors beside it")

    def test_every_flipped_bit_is_noticed(self, folder, refused):
        file = checkpoint_file(folder)
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):  # of the tensors
            place = int(torch.randint(start, len(content), (), generator=generator))
            content[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"does not have the checksum.*best.safetensors"):
                load_checkpoint(file)
            refused("is damaged") if place % 10 == 0 else None
            content = bytearray(checkpoint_file(folder, "best").read_bytes())

    def test_changed_numbers_are_noticed(self, folder, refused):
        file = checkpoint_file(folder)
        content = file.read_bytes()
        place = content.index(b"0.", content.index(b"kl_weight")) + 2
        file.write_bytes(content[:place] + b"7" + content[place + 1 :])
        assert file.read_bytes() != content
        refused("does not have the checksum")

    def test_the_best_may_be_used_instead(self, tiny, folder):
        model, whole = tiny.problem()
        history = tiny.train(model, whole, epochs=2).history
        file = checkpoint_file(folder)
        file.write_bytes(checkpoint_file(folder, "best").read_bytes())
        model, guide = tiny.problem()
        run = tiny.train(model, guide, out=folder, resume=True, epochs=2)
        assert tiny.without_seconds(run.history) == tiny.without_seconds(history)
        tiny.assert_equal(tiny.state(guide), tiny.state(whole))

    def test_lost(self, tiny, folder):
        checkpoint_file(folder).unlink()
        with pytest.raises(FileNotFoundError, match=r"expected a checkpoint.*best.safetensors"):
            tiny.train(*tiny.problem(), out=folder, resume=True)

    def test_another_model(self, refused):
        refused("holds a model of class SpikeSlabGaussian, expected", "ss-gl")

    @pytest.mark.parametrize("options", [{"hidden": 6}, {"prune_inputs": True}], ids=str)
    def test_another_network_or_option(self, options, refused):
        refused(r"does not fit this (model|guide).*differ", **options)

    def test_another_format(self, tiny, folder, refused):
        tensors = load_file(checkpoint_file(folder))
        for metadata in (None, {"pyro_sparse": json.dumps({"format": 99})}):
            save_file(tensors, checkpoint_file(folder), metadata=metadata)
            refused(r"has checkpoint format .*, expected 2")

    def test_without_a_state_of_training(self, tiny, folder, refused):
        save_checkpoint(checkpoint_file(folder), *tiny.problem(), progress={"history": []})
        refused("no state of training")


class TestAnotherRun:
    """What fits by its shapes, and is of another run all the same."""

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"epochs": 3}, "option epochs was 2, is 3"),
            ({"lr": 0.5}, "option rate 0 was"),
            ({"num_particles": 2}, "option num_particles was 1, is 2"),
        ],
        ids=str,
    )
    def test_options_of_training(self, tiny, folder, changed, named):
        with pytest.raises(ValueError, match=rf"of another run: .*{named}.*begin another folder"):
            tiny.train(*tiny.problem(), out=folder, resume=True, **({"epochs": 2} | changed))

    def test_data(self, tiny, folder):
        x, y = tiny.data()
        for loader in (
            Batches(x, y.roll(1), 20, seed=1),
            Batches(x + 1e-6, y, 20, seed=1),
            Batches(x.flip(0), y.flip(0), 20, seed=1),
        ):
            with pytest.raises(ValueError, match="another data"):
                tiny.train(*tiny.problem(), out=folder, resume=True, epochs=2, loader=loader)
        loader = Batches(x, y, 10, seed=1)
        with pytest.raises(ValueError, match="loader batch_size was 20, is 10"):
            tiny.train(*tiny.problem(), out=folder, resume=True, epochs=2, loader=loader)

    def test_prior_and_activation(self, tiny, folder):
        x = tiny.data()[0]
        for activation, options, named in (
            ("relu", {}, "another network"),
            ("silu", {"slab_scale": 9.0}, "constant slab_scale was 1.0, is 9.0"),
            ("silu", {"num_data": len(x) // 2}, "num_data"),
        ):
            net = nets.mlp([4, 5, 2], activation)
            model = models.SpikeSlabGaussian(net, x[:2], **({"num_data": len(x)} | options))
            guide = guides.for_model(model)
            untouched = tiny.state(guide)
            with pytest.raises(ValueError, match=named):
                tiny.train(model, guide, out=folder, resume=True, epochs=2)
            tiny.assert_equal(tiny.state(guide), untouched)


class TestStateOfTheOptimiser:
    """Fused updates trust shapes, and would write beyond a tensor."""

    def changed(self, folder, change) -> None:
        file = checkpoint_file(folder)
        state = load_checkpoint(file)
        names = [name for name in state.tensors if name.endswith("exp_avg")]
        change(state, max(names, key=lambda name: state.tensors[name].numel()))
        checkpoint.write_checkpoint(file, state)  # with a checksum that is right

    def shorter(self, state, name):
        state.tensors[name] = state.tensors[name].flatten()[:1].clone()

    def scalar(self, state, name):
        state.tensors[name] = torch.tensor(0.0)

    def doubles(self, state, name):
        state.tensors[name] = state.tensors[name].double()

    def another_index(self, state, name):
        state.tensors["optimizer.99.exp_avg"] = state.tensors[name].clone()

    def without_an_option(self, state, name):
        del state.header["optimizer"][0]["eps"]

    def other_parameters(self, state, name):
        state.header["optimizer"][0]["params"] = [0, 0]

    @pytest.mark.parametrize(
        "change",
        ["shorter", "scalar", "doubles", "another_index", "without_an_option", "other_parameters"],
    )
    def test_refused(self, tiny, folder, change):
        self.changed(folder, getattr(self, change))
        model, guide = tiny.problem()
        untouched = tiny.state(guide)
        with pytest.raises(ValueError, match=r"does not fit this optimiser \(FusedAdam\)"):
            tiny.train(model, guide, out=folder, resume=True, epochs=2)
        tiny.assert_equal(tiny.state(guide), untouched)

    def test_random_state(self, tiny, folder):
        def shorter(state, name):
            state.tensors["random.cpu"] = state.tensors["random.cpu"][:8].clone()

        self.changed(folder, shorter)
        with pytest.raises(ValueError, match=r"random.cpu missing, or of another shape"):
            tiny.train(*tiny.problem(), out=folder, resume=True, epochs=2)


class TestOneWriter:
    def test_a_second_process_is_refused(self, tiny, folder):
        """The lock is the system's, as a process that waits for its standard input shows."""
        script = (
            "import sys, filelock\n"
            f"with filelock.FileLock({str(folder / 'checkpoint' / 'lock')!r}):\n"
            "    print('locked', flush=True)\n"
            "    sys.stdin.read()\n"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with other:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(OSError, match="is being written by another process"):
                tiny.train(*tiny.problem(), out=folder, resume=True, epochs=2)
            assert len(tiny.lines(folder)) == 1
            other.kill()
        assert len(tiny.train(*tiny.problem(), out=folder, resume=True, epochs=2).history) == 2


class TestFailedWrites:
    def test_a_full_disk(self, tiny, tmp_path, monkeypatch):
        """The third write fails half-way: what was there stays, and nothing is left beside it."""
        written = 0

        def full(tensors, path, metadata):
            nonlocal written
            written += 1
            save_file(tensors, path, metadata=metadata)
            if written >= 3:
                os.truncate(path, 100)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint, "save_file", full)
        model, guide = tiny.problem()
        message = r"cannot write .*No space left on device.*written before are untouched"
        with pytest.raises(OSError, match=message):
            tiny.train(model, guide, out=tmp_path, epochs=5)
        monkeypatch.undo()
        names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
        assert names == {"last.safetensors", "best.safetensors", "lock"}
        model, guide = tiny.problem()
        run = tiny.train(model, guide, out=tmp_path, epochs=5, resume=True)
        model, whole = tiny.problem()
        other = tiny.train(model, whole, epochs=5)
        assert tiny.without_seconds(run.history) == tiny.without_seconds(other.history)
        tiny.assert_equal(tiny.state(guide), tiny.state(whole))

    def test_no_room_is_found_before_training(self, tiny, tmp_path, monkeypatch):
        class Usage:
            free = 1000

        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
        model, guide = tiny.problem()
        untouched = tiny.state(guide)
        with pytest.raises(OSError, match=r"expected .* MiB of free space .* found 0\.0 MiB"):
            tiny.train(model, guide, out=tmp_path)
        tiny.assert_equal(tiny.state(guide), untouched)

    def test_a_folder_that_cannot_be(self, tiny, tmp_path):
        (tmp_path / "file").write_text("")
        model, guide = tiny.problem()
        untouched = tiny.state(guide)
        with pytest.raises(OSError, match=r"cannot write to .*file.*Choose a folder"):
            tiny.train(model, guide, out=tmp_path / "file" / "run")
        tiny.assert_equal(tiny.state(guide), untouched)

    def test_leftovers_of_a_killed_write_are_removed(self, tiny, folder):
        leftover = folder / "checkpoint" / "last.safetensors.tmp"
        leftover.write_bytes(b"half")
        tiny.train(*tiny.problem(), out=folder, resume=True, epochs=2)
        assert not leftover.exists()
