"""How often do nominal 95 % intervals of the AUROC hold the true AUROC?

Binormal scores with a known AUROC; every row is one study design, repeated. Subjects with two scans have
correlated scores; `scans` ignores whose they are, which is the mistake that the other columns do not make.

    python benchmarks/coverage.py --draws 2000
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np
from scipy.stats import norm

from dinoatten3d.evaluation.intervals import bootstrap_intervals, delong_interval


def study(
    generator: np.random.Generator, n_subjects: int, prevalence: float, auroc: float, scans: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and subjects of one binormal study; two scans of a subject correlate with 0.6."""
    n_positive = round(n_subjects * prevalence)
    labels = np.repeat(np.arange(n_subjects) < n_positive, scans).astype(int)
    subjects = np.repeat(np.arange(n_subjects), scans)
    shared = np.repeat(generator.normal(size=n_subjects), scans)
    own = generator.normal(size=n_subjects * scans)
    correlation = 0.6 if scans > 1 else 0.0
    noise = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return labels, labels * np.sqrt(2) * norm.ppf(auroc) + noise, subjects


def coverage(draws: int, seed: int, n_subjects: int, prevalence: float, auroc: float, scans: int) -> dict[str, float]:
    """Share of studies whose interval holds the true AUROC, for each kind of interval."""
    held: dict[str, list[bool]] = {"DeLong (logit)": [], "bootstrap": [], "scans": []}
    for generator in np.random.default_rng(seed).spawn(draws):
        labels, scores, subjects = study(generator, n_subjects, prevalence, auroc, scans)
        positive = norm.cdf(scores)
        probabilities = np.column_stack([1 - positive, positive])
        found = {
            "DeLong (logit)": delong_interval(labels, scores, subjects=subjects),
            "bootstrap": bootstrap_intervals(labels, probabilities, subjects, seed=generator)["auroc"],
            "scans": delong_interval(labels, scores),
        }
        for kind, interval in found.items():
            held[kind].append(interval.low <= auroc <= interval.high)
    return {kind: float(np.mean(hits)) for kind, hits in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="studies a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| subjects | positive | scans each | AUROC | DeLong (logit) | bootstrap | scans as subjects |")
    print("|---|---|---|---|---|---|---|")
    for n, prevalence, scans, auroc in product((40, 100, 400), (0.5, 0.25), (1, 2), (0.75, 0.9)):
        share = coverage(options.draws, options.seed, n, prevalence, auroc, scans)
        figures = " | ".join(f"{100 * value:.1f} %" for value in share.values())
        print(f"| {n} | {100 * prevalence:.0f} % | {scans} | {auroc} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
