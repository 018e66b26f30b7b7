"""Pictures that are not drawn, where a test is about something else."""

from collections.abc import Iterator

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

DRAWN = FigureCanvasAgg.print_png


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Runs plot on their axes, but lay out and draw nothing, which is half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", lambda canvas, path: path.write_bytes(b""))
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of pictures in a module of blank ones."""
    monkeypatch.setattr(FigureCanvasAgg, "print_png", DRAWN)
