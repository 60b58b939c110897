"""What is adjusted comes from the training scans alone, takes the covariate out, and leaves the rest in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dinoatten3d.config import AdjustConfig, EvaluationConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError, ConfigError
from dinoatten3d.evaluation.controls import fit_and_score, mean_pooled, run_baselines
from dinoatten3d.evaluation.metrics import score
from dinoatten3d.features.store import PatchTokens
from dinoatten3d.learning.adjust import Adjustment, fit_adjustment, mean_token, refuse_one_site, slice_values
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.combat import fit_combat
from dinoatten3d.learning.fit import AdjustedModel, cross_validate
from dinoatten3d.learning.splits import partition
from test_learning import QUICK, bags

SITE = AdjustConfig(covariates=("site",))
COMBAT = AdjustConfig(covariates=("site",), method="combat")
BOTH = pytest.mark.parametrize("config", [SITE, COMBAT], ids=["residual", "combat"])


def scanned(
    *,
    n: int = 60,
    dim: int = 30,
    seed: int = 0,
    confounded: float = 0.7,
    site_effect: float = 1.0,
    class_effect: float = 0.0,
    age_effect: float = 0.0,
) -> Bags:
    """Make bags of two sites that go with the class, in which a site adds to all slices of a scan."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], n // 2)
    other = rng.random(n) < np.where(labels == 1, confounded, 1 - confounded)
    age = rng.normal(50, 10, n)
    x = rng.normal(size=(n, 4, dim)) + rng.normal(size=(n, 1, dim))
    x += (site_effect * other + age_effect * (age - 50))[:, None, None] * np.sign(np.arange(dim) % 2 - 0.5)
    x += class_effect * labels[:, None, None] * np.sign(np.arange(dim) % 3 - 0.5)
    scans = [
        Scan(id=str(i), path=Path(str(i)), subject=str(i), row=i, site="AB"[int(other[i])], age=age[i], sex="fm"[i % 2])
        for i in range(n)
    ]
    return Bags(
        features=torch.from_numpy(x).float(),
        mask=torch.ones(n, 4, dtype=torch.bool),
        labels=torch.from_numpy(labels),
        scans=tuple(scans),
        position_mm=np.zeros((n, 4)),
        brain_ml=rng.normal(1400, 100, n),
        classes=("NL", "AD"),
        planes=("axial",) * 4,
        tokens=(None,) * n,
    )


def with_tokens(data: Bags, seed: int = 0) -> Bags:
    """Add patch tokens whose level is that of the scan's slices, and their means."""
    rng = np.random.default_rng(seed)
    level = data.features.mean(dim=1).numpy()
    tokens = []
    for own in level:
        values = rng.normal(size=(4, 3, 3, len(own))) + own
        tissue = rng.random((4, 3, 3)) < 0.7
        tokens.append(
            PatchTokens(
                tokens=values.astype(np.float16),
                tissue=tissue,
                blemished=values[:2].astype(np.float16),
                blemished_slice=np.array([0, 1]),
                blemished_weight=np.zeros((2, 3, 3), np.float32),
                blemished_factor=np.array([0.5, 1.5]),
            )
        )
    means = torch.from_numpy(np.stack([t.tokens.astype(np.float32).mean(axis=(1, 2)) for t in tokens]))
    return replace(data, tokens=tuple(tokens), means=means)


def gap(data: Bags, values: np.ndarray) -> float:
    site = np.array([scan.site for scan in data.scans])
    return float(np.abs(values[site == "B"].mean(axis=0) - values[site == "A"].mean(axis=0)).mean())


def cross_validated(data: Bags, adjust: Callable[[Bags, Bags], tuple[Bags, Bags]], seed: int) -> float:
    """AUROC of mean pooling, with what `adjust` makes of training and held-out scans."""
    folds = partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(seed=seed))[0]
    answers = np.zeros((len(data), 2))
    for fold in np.unique(folds):
        train, held_out = adjust(data.take(np.flatnonzero(folds != fold)), data.take(np.flatnonzero(folds == fold)))
        answers[folds == fold] = fit_and_score(mean_pooled(train), train.labels.numpy(), mean_pooled(held_out), 0.01)
    return score(data.labels.numpy(), answers).auroc


def honestly(config: AdjustConfig) -> Callable[[Bags, Bags], tuple[Bags, Bags]]:
    def adjust(train: Bags, held_out: Bags) -> tuple[Bags, Bags]:
        fitted = fit_adjustment(train, config)
        return fitted.apply(train), fitted.apply(held_out)

    return adjust


def test_combat_gives_the_figures_of_neurocombat() -> None:
    rng = np.random.default_rng(0)
    site, age = np.repeat([0, 1, 2], 10), np.linspace(-20, 20, 30)[rng.permutation(30)]
    x = rng.normal(size=(30, 6)) * np.array([1, 2, 0.5, 3, 1, 1]) + 0.05 * age[:, None]
    x = (x + np.array([0, 1.5, -1])[site][:, None] * rng.normal(size=6)) * np.array([1, 1.5, 0.7])[site][:, None]
    # neuroCombat 0.2.12: neuroCombat(dat=x.T, covars={batch, age}, batch_col="batch", continuous_cols=["age"])
    wanted = [
        [-0.630896, 0.508387, -1.015651, -4.355773, -2.252824, -1.577294],
        [3.125012, 1.832889, 1.508209, 0.532903, -0.704297, 0.743421],
        [0.396122, -1.444079, 0.219845, -0.810802, -1.310855, -1.290214],
    ]
    harmonised = fit_combat(x, age[:, None], site)(x, age[:, None], site)
    np.testing.assert_allclose(harmonised[[0, 11, 29]], wanted, atol=2e-6)


@BOTH
def test_the_site_is_gone_from_slices_and_patches_of_scans_that_were_not_fitted(config: AdjustConfig) -> None:
    data = with_tokens(scanned(n=400, confounded=0.5))
    train, held_out = data.take(np.arange(0, 400, 2)), data.take(np.arange(1, 400, 2))
    adjusted = fit_adjustment(train, config).apply(held_out)
    for name in ("features", "means", "tokens"):
        before, after = gap(held_out, slice_values(held_out, name)), gap(held_out, slice_values(adjusted, name))
        assert before > 0.8, name
        assert after < 0.3 * before, name


def test_the_effect_of_age_is_gone_and_that_of_the_class_stays() -> None:
    data = scanned(n=400, site_effect=0, age_effect=0.1, class_effect=1)
    train, held_out = data.take(np.arange(0, 400, 2)), data.take(np.arange(1, 400, 2))
    adjusted = fit_adjustment(train, AdjustConfig(covariates=("age",))).apply(held_out)
    age = np.array([scan.age for scan in held_out.scans])

    def slope(bags: Bags) -> float:
        return float(np.abs(np.polyfit(age, mean_pooled(bags), 1)[0]).mean())

    classes = held_out.labels.numpy() == 1
    assert slope(adjusted) < 0.25 * slope(held_out)
    difference = mean_pooled(adjusted)[classes].mean(axis=0) - mean_pooled(adjusted)[~classes].mean(axis=0)
    assert np.abs(difference).mean() > 0.8


@BOTH
def test_a_held_out_scan_has_no_part_in_the_adjustment_of_its_fold(config: AdjustConfig) -> None:
    data = with_tokens(scanned())
    folds = partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(folds=3))
    adjusted = replace(QUICK, adjust=config)
    changed = folds[0] == 0
    features, labels = data.features.clone(), data.labels.clone()
    features[torch.from_numpy(changed)] += 100
    labels[torch.from_numpy(changed)] = 1 - labels[torch.from_numpy(changed)]
    scans = tuple(replace(s, site="B", age=99.0) if c else s for s, c in zip(data.scans, changed, strict=True))
    other = replace(data, features=features, labels=labels, scans=scans)
    models = [
        cross_validate(bags, adjusted, EvaluationConfig(folds=3), folds=folds).fitted[0].model for bags in (data, other)
    ]
    for name, tensor in models[0].tensors().items():
        assert torch.equal(tensor, models[1].tensors()[name]), name


@BOTH
def test_labels_have_no_part_in_the_adjustment(config: AdjustConfig) -> None:
    data = scanned()
    flipped = replace(data, labels=1 - data.labels)
    one, two = (fit_adjustment(bags, config).tensors() for bags in (data, flipped))
    assert all(torch.equal(one[name], two[name]) for name in one)


@BOTH
def test_without_an_effect_of_the_class_an_adjusted_site_leaves_chance(config: AdjustConfig) -> None:
    draws = [scanned(seed=seed) for seed in range(12)]
    plain = [cross_validated(data, lambda train, held_out: (train, held_out), 0) for data in draws]
    adjusted = [cross_validated(data, honestly(config), 0) for data in draws]
    assert np.mean(plain) > 0.62
    assert abs(np.mean(adjusted) - 0.5) < 0.06


def test_adjusting_all_scans_before_the_split_biases_the_figure_and_the_fold_does_not() -> None:
    """The leak that is closed here: with a class decided by the covariate, its residuals are below chance."""
    leaking, honest = [], []
    for seed in range(12):
        data = scanned(n=40, dim=100, seed=seed, confounded=1.0)
        everyone = fit_adjustment(data, SITE).apply(data)
        leaking.append(cross_validated(everyone, lambda train, held_out: (train, held_out), 0))
        honest.append(cross_validated(data, honestly(SITE), 0))
    assert np.mean(leaking) < 0.2
    assert abs(np.mean(honest) - 0.5) < 0.1


def test_patches_move_with_their_slice_and_padding_stays_empty() -> None:
    data = with_tokens(scanned())
    mask = data.mask.clone()
    mask[:, 3] = False
    data = replace(data, mask=mask, features=data.features * mask[..., None])
    adjusted = fit_adjustment(data, COMBAT).apply(data)
    assert not adjusted.features[:, 3].any()
    before, after = data.tokens[0], adjusted.tokens[0]
    assert before is not None
    assert after is not None
    step = after.tokens.astype(float) - before.tokens
    np.testing.assert_allclose(step, np.broadcast_to(step[:, :1, :1], step.shape), atol=0.01)
    np.testing.assert_allclose(after.blemished.astype(float) - before.blemished, step[:2], atol=0.01)


def test_a_covariate_in_one_slice_does_not_get_into_the_others() -> None:
    data = scanned(site_effect=0, confounded=0.5, n=200)
    site = torch.tensor([scan.site == "B" for scan in data.scans])
    features = data.features.clone()
    features[:, 0] += 3 * site[:, None]
    data = replace(data, features=features)
    train, held_out = data.take(np.arange(0, 200, 2)), data.take(np.arange(1, 200, 2))
    adjusted = fit_adjustment(train, SITE).apply(held_out)
    for number in range(4):
        assert gap(adjusted, adjusted.features[:, number].numpy()) < 0.6


@BOTH
@given(site=st.one_of(st.none(), st.sampled_from(["C", "", "n/a", "a"])))
def test_an_unknown_site_is_left_as_it_is_with_a_note(config: AdjustConfig, site: str | None) -> None:
    data = scanned()
    fitted = fit_adjustment(data, config)
    one = data.take(np.array([0]))
    stranger = replace(one, scans=(replace(one.scans[0], site=site),))
    torch.testing.assert_close(fitted.apply(stranger).features, one.features)
    assert len(fitted.unknown(stranger)) == 1
    assert "site" in fitted.unknown(stranger)[0]
    assert fitted.unknown(one) == []


def test_an_unknown_age_is_taken_at_the_mean_with_a_note() -> None:
    data = scanned(age_effect=0.1)
    fitted = fit_adjustment(data, AdjustConfig(covariates=("age", "sex", "head-size")))
    one = data.take(np.array([3]))
    ages = [None, float(np.mean([scan.age for scan in data.scans]))]
    unknown, average = (replace(one, scans=(replace(one.scans[0], age=age),)) for age in ages)
    torch.testing.assert_close(fitted.apply(unknown).features, fitted.apply(average).features)
    assert "age, which was not given" in fitted.unknown(unknown)[0]


def test_a_rare_category_counts_as_unknown_and_an_empty_column_is_refused() -> None:
    data = scanned()
    rare = replace(data, scans=(replace(data.scans[0], site="C"), *data.scans[1:]))
    assert fit_adjustment(rare, SITE).design.levels("site") == ["A", "B"]
    empty = replace(data, scans=tuple(replace(scan, site=None) for scan in data.scans))
    with pytest.raises(CohortError, match="no training scan has a site"):
        fit_adjustment(empty, SITE)
    alone = replace(data, scans=tuple(replace(scan, site=f"s{n}") for n, scan in enumerate(data.scans)))
    for config in (SITE, COMBAT):
        with pytest.raises(CohortError, match="no training scan has a site .that 3 or more share"):
            fit_adjustment(alone, config)


def test_sites_that_are_all_rare_are_refused_and_a_single_one_is_known() -> None:
    data = scanned()
    rare = replace(data, scans=tuple(replace(scan, site=f"S{i // 2}") for i, scan in enumerate(data.scans)))
    for config in (SITE, COMBAT):
        with pytest.raises(CohortError, match="that 3 or more share"):
            fit_adjustment(rare, config)
    single = replace(data, scans=tuple(replace(scan, site="A") for scan in data.scans))
    assert fit_adjustment(single, SITE).unknown(single.take(np.array([0]))) == []


@BOTH
def test_an_adjustment_survives_the_disk(config: AdjustConfig, tmp_path: Path) -> None:
    data = with_tokens(scanned())
    with_age = replace(config, covariates=(*config.covariates, "age"))
    fitted = fit_adjustment(data, with_age)
    save_file(fitted.tensors(), tmp_path / "adjust.safetensors")
    read = Adjustment.from_tensors(load_file(tmp_path / "adjust.safetensors"))
    one, two = fitted.apply(data), read.apply(data)
    assert torch.equal(one.features, two.features)
    np.testing.assert_array_equal(mean_token(one), mean_token(two))


def test_image_baselines_are_adjusted_and_the_others_are_not() -> None:
    data = scanned(site_effect=2)
    folds = partition(data.scans, data.labels.numpy(), data.classes, EvaluationConfig(folds=3))
    plain, adjusted = (run_baselines(data, folds, "DX", config) for config in (AdjustConfig(), SITE))
    same = {name for name in plain if np.array_equal(plain[name], adjusted[name])}
    assert same == {"prior", "head size", "covariates"}


def test_a_model_adjusts_what_it_is_given() -> None:
    data = bags(signal=3)
    result = cross_validate(
        data, replace(QUICK, adjust=AdjustConfig(covariates=("head-size",))), EvaluationConfig(folds=3)
    )
    assert all(isinstance(fold.model, AdjustedModel) for fold in result.fitted)
    assert score(data.labels.numpy(), result.scored.probabilities).auroc > 0.9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"covariates": ("weight",)}, "wanted some of age, sex, site, head-size"),
        ({"covariates": ("age", "age")}, "each once"),
        ({"covariates": ("age",), "method": "combat"}, "add --adjust.covariates site"),
        ({"method": "combat"}, "add --adjust.covariates site"),
        ({"method": "regress"}, "residual or combat"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdjustConfig(**settings)  # type: ignore[arg-type]


def test_one_site_is_not_harmonised() -> None:
    scans = [replace(scan, site="here") for scan in bags().scans]
    with pytest.raises(CohortError, match="all scans are from here"):
        refuse_one_site(AdjustConfig(covariates=("site",), method="combat"), scans)
    refuse_one_site(AdjustConfig(covariates=("site",)), scans)
