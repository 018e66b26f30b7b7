"""The zoo: every model by its command-line name, with what one needs to choose it."""

from __future__ import annotations

from dataclasses import dataclass

from .names import nearest

__all__ = ["ZOO", "Entry", "find"]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: as the command line has it.
        model: name of the model's class, and of its guide's. A name, so that listing the zoo
            does not import torch.
        title: its full name.
        paper: where it comes from.
        prior: in a line.
        guide: in a line.
        rule: which units are kept.
        use: "use it when ..." in a line.
    """

    name: str
    model: str
    title: str
    paper: str
    prior: str
    guide: str
    rule: str
    use: str


ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="ss-ig",
            model="SpikeSlabGaussian",
            title="spike-and-slab, independent Gaussian (SS-IG)",
            paper="Jantre, Bhattacharya, Maiti, Neural Networks 167 (2023)",
            prior="z ~ Bernoulli(λ_l), w | z=1 ~ N(0, σ0² I)",
            guide="Bernoulli(γ) × Gaussian, tied or full variance",
            rule="inclusion probability > ½",
            use="you want the simplest spike-and-slab prior, and inclusion probabilities to read",
        ),
        Entry(
            name="ss-gl",
            model="SpikeSlabGroupLasso",
            title="spike-and-slab group lasso (SS-GL)",
            paper="Jantre, Bhattacharya, Maiti, IEEE TNNLS 36 (2025)",
            prior="as SS-IG with w | z=1 ~ N(0, σ0² τ² I), τ² ~ Gamma((m+1)/2, ς²/2)",
            guide="as SS-IG, log-normal τ² a unit and ς² a network",
            rule="inclusion probability > ½",
            use="units should differ in scale, and the network learns how strongly to shrink",
        ),
        Entry(
            name="ss-ghs",
            model="SpikeSlabGroupHorseshoe",
            title="spike-and-slab group horseshoe (SS-GHS)",
            paper="Jantre, Bhattacharya, Maiti, IEEE TNNLS 36 (2025)",
            prior="as SS-IG with w | z=1 ~ N(0, σ0² ρ̃² I), ρ = sτ, s and τ half-Cauchy",
            guide="as SS-IG, log-normal factors of s and of τ a unit",
            rule="inclusion probability > ½",
            use="you want the smallest network: heavy tails keep few units, shrink the others",
        ),
        Entry(
            name="dense",
            model="Deterministic",
            title="dense network, point estimates",
            paper="the baseline",
            prior="flat, or N(0, σ²) as weight decay",
            guide="a point mass",
            rule="all units",
            use="you need the number to compare with",
        ),
        Entry(
            name="turbo-vbi",
            model="TurboMarkov",
            title="three-layer hierarchy with a Markov support (Turbo-VBI)",
            paper="Xia, Tsang, Lau, IEEE TSP 71 (2023)",
            prior="s a Markov chain of units, ρ | s ~ Gamma(a_s, b_s), w | ρ ~ N(0, 1/ρ)",
            guide="s a chain by sum-product, ρ | s gamma, both closed; Gaussian w by SVI",
            rule="inclusion probability > ½",
            use="neighbouring units, or blocks of weights, should be kept or dropped together",
        ),
    )
}


def find(name: str) -> Entry:
    """The entry called ``name``; ``ValueError`` with the nearest names where there is none."""
    if name not in ZOO:
        raise ValueError(nearest("model", name, ZOO))
    return ZOO[name]
