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
            name="bc-gnj",
            model="GroupNormalJeffreys",
            title="group normal-Jeffreys (BC-GNJ)",
            paper="Louizos, Ullrich, Welling, NeurIPS 2017",
            prior="p(z) ∝ 1/|z| a unit, w | z ~ N(0, z² I)",
            guide="Gaussian z a unit, Gaussian rows, full or tied variance",
            rule="log dropout rate log α < 0",
            use="you want a prior without anything to tune, and weights in few bits",
        ),
        Entry(
            name="bc-ghs",
            model="GroupHorseshoe",
            title="group horseshoe (BC-GHS)",
            paper="Louizos, Ullrich, Welling, NeurIPS 2017",
            prior="w ~ N(0, s² τ² I), s half-Cauchy a layer and τ a unit",
            guide="log-normal factors of s and τ, Gaussian rows, full or tied variance",
            rule="mean log scale within 2 of the layer's largest",
            use="you want continuous shrinkage without a spike, and weights in few bits",
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
    )
}


def find(name: str) -> Entry:
    """The entry called ``name``; ``ValueError`` with the nearest names where there is none."""
    if name not in ZOO:
        raise ValueError(nearest("model", name, ZOO))
    return ZOO[name]
