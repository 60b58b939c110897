"""The loss is the published one where it says so, members do not see each other, folds keep subjects together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import shared
from dinoatten3d.config import EvaluationConfig, LossConfig, ModelConfig, Recipe, TrainingConfig
from dinoatten3d.data.cohort import Scan
from dinoatten3d.errors import CohortError, FeatureError
from dinoatten3d.learning.bags import Bags
from dinoatten3d.learning.fit import cross_validate, fit_fold
from dinoatten3d.learning.losses import composite_loss, cross_entropy, supcon, within_class_variance
from dinoatten3d.learning.model import SliceAttentionNet, attend
from dinoatten3d.learning.splits import inner_folds, outer_folds
from dinoatten3d.toml import load_recipe

QUICK = Recipe(
    model=ModelConfig(pooling="attention", attention_width=8),
    training=TrainingConfig(members=3, inner_folds=3, epochs=30, patience=0, learning_rate=1e-2),
)


def bags(
    *, per_class: int = 12, classes: int = 2, slices: int = 6, dim: int = 10, seed: int = 0, signal: float = 3
) -> Bags:
    """Make bags in which one slice (named as the scan's site) carries the class; subjects have two scans each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    x = rng.normal(size=(len(labels), slices, dim))
    place = rng.integers(slices, size=len(labels))
    x[np.arange(len(labels)), place, labels] += signal * 2
    mask = np.ones((len(labels), slices), dtype=bool)
    subjects = [f"s{n // 2}" for n in range(len(labels))]
    return Bags(
        features=torch.from_numpy(x).float(),
        mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        scans=tuple(
            Scan(id=str(n), path=Path(str(n)), subject=s, row=n, site=str(place[n])) for n, s in enumerate(subjects)
        ),
        position_mm=np.tile(np.arange(slices, dtype=float), (len(labels), 1)),
        brain_ml=rng.normal(1400, 100, len(labels)),
        classes=tuple("ABCD"[:classes]),
        planes=("axial",) * slices,
        tokens=(None,) * len(labels),
    )


@pytest.mark.parametrize("case", ["balanced", "imbalanced", "lonely", "three"])
def test_the_published_loss_is_reproduced(case: str) -> None:
    golden = load_file(shared("golden", "published_method.safetensors"))
    embedding, logits, labels = (golden[f"loss_{case}_{part}"] for part in ("embedding", "logits", "labels"))
    include = torch.ones(1, len(labels), dtype=torch.bool)
    terms = composite_loss(logits[None], embedding[None], labels[None], include, load_recipe("published").loss)
    wanted = golden[f"loss_{case}_terms_total_ce_supcon_variance"]
    torch.testing.assert_close(torch.cat(list(terms)), wanted, atol=1e-5, rtol=1e-5)


def test_the_published_forward_pass_is_reproduced() -> None:
    golden = load_file(shared("golden", "published_method.safetensors"))
    config = load_recipe("published").model
    model = SliceAttentionNet(dim=384, classes=2, members=1, config=config, generator=torch.Generator())
    names = {
        "attention.hidden": "attn.attn.0",
        "attention.score": "attn.attn.2",
        "embedding.layers.0": "embedding_head.0",
        "embedding.layers.1": "embedding_head.2",
        "classifier": "classifier",
    }
    state = model.state_dict()
    for mine, theirs in names.items():
        state[f"{mine}.weight"] = golden[f"model_weights.{theirs}.weight"].T[None]
        state[f"{mine}.bias"] = golden[f"model_weights.{theirs}.bias"][None]
    model.load_state_dict(state)
    model.eval()
    bag = golden["model_features"][None]
    mask = torch.ones(1, 50, dtype=torch.bool)
    out = model(model.scaled(bag)[None], mask[None])
    for mine, theirs in ((out.weights, "slice_weights"), (out.embedding, "embedding"), (out.logits, "logits")):
        torch.testing.assert_close(mine[0, 0], golden[f"model_{theirs}"], atol=1e-5, rtol=1e-5)
    pooled = model.attention(bag[None], mask[None]).feature
    torch.testing.assert_close(pooled[0, 0], golden["model_pooled"], atol=1e-5, rtol=1e-5)


def test_a_slice_may_be_its_patches_instead_of_its_cls_token() -> None:
    plain = bags(signal=0)
    deep = replace(plain, means=bags(signal=8, dim=14).features)
    config = replace(QUICK, model=replace(QUICK.model, slice_features="mean"))
    figures = {
        kind: cross_validate(
            deep, replace(config, model=replace(QUICK.model, slice_features=kind)), EvaluationConfig(folds=3)
        )
        for kind in ("cls", "mean", "cls+mean")
    }
    right = {k: (r.scored.probabilities.argmax(axis=1) == deep.labels.numpy()).mean() for k, r in figures.items()}
    assert right["mean"] > 0.8 > right["cls"]
    shapes = {k: r.fitted[0].model.tensors()["mean"].shape[-1] for k, r in figures.items()}
    assert shapes == {"cls": 10, "mean": 14, "cls+mean": 24}
    with pytest.raises(FeatureError, match="needs patch means"):
        cross_validate(plain, config, EvaluationConfig(folds=3))


def test_supcon_agrees_with_its_formula_written_out() -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=-1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    losses = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if positives:
            total = sum(torch.exp(z[i] @ z[a] / 0.1) for a in others)
            losses.append(-sum(torch.log(torch.exp(z[i] @ z[p] / 0.1) / total) for p in positives) / len(positives))
    everyone = torch.ones(1, 7, dtype=torch.bool)
    torch.testing.assert_close(supcon(z[None], labels[None], everyone, 0.1)[0], sum(losses) / len(losses))
    published = supcon(z[None], labels[None], everyone, 0.1, "zero")[0]
    torch.testing.assert_close(published, sum(losses) / 7)


def test_a_batch_without_positives_has_no_contrast_and_no_nan() -> None:
    z = torch.randn(1, 3, 4, requires_grad=True)
    loss = supcon(z, torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool), 0.07)
    loss.sum().backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_variance_is_zero_at_the_class_means_and_acts_when_summed() -> None:
    z = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    labels, include = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    assert within_class_variance(z, labels, include).item() == 0
    spread = torch.randn(1, 4, 128)
    total = within_class_variance(spread, labels, include, "sum")
    torch.testing.assert_close(within_class_variance(spread, labels, include, "mean") * 128, total)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), scans=st.integers(4, 12), config=st.sampled_from(["default", "paper", "published"]))
def test_a_scan_left_out_of_a_member_does_not_change_its_loss(seed: int, scans: int, config: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, scans, 2, generator=generator)
    embedding = torch.randn(2, scans, 5, generator=generator)
    labels = (torch.arange(scans) % 2)[None]
    include = torch.ones(2, scans, dtype=torch.bool)
    include[1, -1] = False
    loss = replace(load_recipe(config).loss, supcon=1.0, variance=0.1)
    both = composite_loss(logits, embedding, labels, include, loss)
    alone = composite_loss(logits[1:, :-1], embedding[1:, :-1], labels[:, :-1], include[1:, :-1], loss)
    for together, single in zip(both, alone, strict=True):
        torch.testing.assert_close(together[1:], single, atol=1e-5, rtol=1e-4)


def test_class_weights_of_one_are_no_weights() -> None:
    logits, labels = torch.randn(1, 6, 3), torch.tensor([[0, 1, 2, 0, 1, 2]])
    include = torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(
        cross_entropy(logits, labels, include, torch.ones(1, 3)), cross_entropy(logits, labels, include)
    )


def test_padding_changes_nothing() -> None:
    x, scores = torch.randn(2, 5, 3), torch.randn(4, 2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    padded_mask = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    plain = attend(x[None], scores, mask[None])
    padded = attend(
        torch.cat([x, torch.full((2, 2, 3), 9.0)], dim=1)[None],
        torch.cat([scores, torch.full((4, 2, 2), 50.0)], dim=2),
        padded_mask[None],
    )
    torch.testing.assert_close(plain.feature, padded.feature)
    assert (padded.weights[..., 5:] == 0).all()


def test_default_attention_starts_uniform() -> None:
    model = SliceAttentionNet(
        dim=10, classes=2, members=2, config=load_recipe("default").model, generator=torch.Generator()
    )
    weights = model(torch.randn(1, 3, 7, 10), torch.ones(1, 3, 7, dtype=torch.bool)).weights
    torch.testing.assert_close(weights, torch.full((2, 3, 7), 1 / 7))


def test_members_trained_together_are_the_members_trained_alone() -> None:
    """Without shared dropout and batches' order mattering, one member's gradient never reaches another."""
    model = SliceAttentionNet(dim=10, classes=2, members=3, config=QUICK.model, generator=torch.Generator())
    data = bags()
    include = torch.zeros(3, len(data), dtype=torch.bool)
    include[1] = True
    out = model(model.scaled(data.features)[None], data.mask[None])
    composite_loss(out.logits, out.embedding, data.labels[None], include, LossConfig()).total.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad[[0, 2]] == 0).all(), name


def test_published_trains_the_embedding_head_alone() -> None:
    recipe = load_recipe("published")
    recipe = replace(recipe, training=replace(recipe.training, epochs=3, patience=0))
    before = SliceAttentionNet(
        dim=10, classes=2, members=1, config=recipe.model, generator=torch.Generator().manual_seed(5)
    )
    after = fit_fold(bags(), recipe, seed=5).model
    for name, old in before.tensors().items():
        new = after.tensors()[name]
        assert torch.equal(old, new) == (not name.startswith("embedding")), name


def test_a_plain_signal_is_found_and_its_slice_too() -> None:
    data = bags(per_class=24)
    result = cross_validate(data, QUICK, EvaluationConfig(folds=3))
    right = result.scored.probabilities.argmax(axis=1) == data.labels.numpy()
    assert right.mean() > 0.9
    heaviest = result.scored.weights.argmax(axis=1)
    assert (
        np.mean([str(slice_) == scan.site for slice_, scan in zip(heaviest, data.scans, strict=True)]) > 0.4
    )  # 0.17 by chance
    np.testing.assert_allclose(result.scored.weights.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(result.scored.probabilities.sum(axis=1), 1, atol=1e-6)


def test_shuffled_labels_are_at_chance() -> None:
    data = bags(per_class=40, signal=0)
    result = cross_validate(data, QUICK, EvaluationConfig(folds=4))
    right = result.scored.probabilities.argmax(axis=1) == data.labels.numpy()
    assert 0.3 < right.mean() < 0.7


def test_the_same_seed_gives_the_same_answer_and_another_does_not() -> None:
    first, again, other = (
        cross_validate(bags(), QUICK, EvaluationConfig(folds=3, seed=seed)).scored.probabilities for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_scans_that_are_scored_have_no_part_in_the_fit() -> None:
    data = bags()
    folds = outer_folds(data.labels.numpy(), data.subjects, data.classes, folds=3, seed=0)
    features = data.features.clone()
    features[torch.from_numpy(folds == 0)] = 1e3
    spoiled = replace(data, features=features)
    honest = cross_validate(data, QUICK, EvaluationConfig(folds=3), folds=folds)
    other = cross_validate(spoiled, QUICK, EvaluationConfig(folds=3), folds=folds)
    for name, tensor in honest.fitted[0].model.tensors().items():
        assert torch.equal(tensor, other.fitted[0].model.tensors()[name]), name


def test_the_chosen_epoch_is_the_best_on_the_validation_scans() -> None:
    fitted = fit_fold(bags(), QUICK, seed=0)
    for member in range(3):
        rows = [row for row in fitted.history if row["member"] == member]
        chosen = [row for row in rows if row["chosen"]]
        assert len(chosen) == 1
        assert chosen[0]["validation_loss"] == min(row["validation_loss"] for row in rows)


def test_bags_of_different_length_and_more_classes_train() -> None:
    data = bags(classes=4)
    mask = data.mask.clone()
    mask[::2, 4:] = False
    data = replace(data, mask=mask)
    result = cross_validate(data, QUICK, EvaluationConfig(folds=3))
    assert result.scored.probabilities.shape == (48, 4)
    assert (result.scored.weights[::2, 4:] == 0).all()


def test_scoring_a_bag_alone_is_scoring_it_among_others() -> None:
    data = bags()
    model = fit_fold(data, QUICK, seed=0).model
    together = model.score(data)[0]
    alone = np.concatenate([model.score(data.take(np.array([n])))[0] for n in range(len(data))])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(5, 20), min_size=2, max_size=4),
    scans=st.integers(1, 3),
    folds=st.integers(2, 5),
    seed=st.integers(0, 10_000),
)
def test_no_subject_is_in_two_folds_and_every_fold_has_every_class(
    sizes: list[int], scans: int, folds: int, seed: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), [n * scans for n in sizes])
    subjects = np.array([f"s{n // scans}" for n in range(len(labels))])
    classes = tuple(f"c{n}" for n in range(len(sizes)))
    assigned = outer_folds(labels, subjects, classes, folds=folds, seed=seed)
    assert all(len(set(assigned[subjects == subject])) == 1 for subject in set(subjects))
    assert all(set(labels[assigned == fold]) == set(labels) for fold in range(folds))


def test_a_class_with_fewer_subjects_than_folds_is_refused() -> None:
    labels = np.array([0] * 10 + [1] * 6)
    subjects = np.array([f"s{n}" for n in range(10)] + ["t0", "t0", "t0", "t1", "t1", "t2"])
    with pytest.raises(
        CohortError, match=r"class 'AD' has 3 subjects, fewer than the 5 folds; use --evaluation.folds 3"
    ):
        outer_folds(labels, subjects, ("NL", "AD"), folds=5, seed=0)
    with pytest.raises(CohortError, match="class 'AD' has a single subject, .* leave it out with --ignore"):
        outer_folds(labels[:12], subjects[:12], ("NL", "AD"), folds=5, seed=0)


def test_inner_folds_make_do_with_few_subjects_but_not_with_one() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])
    assert set(inner_folds(labels, np.arange(6).astype(str), folds=5, seed=0)) == {0, 1}
    with pytest.raises(CohortError, match="a class has one subject"):
        inner_folds(labels, np.array(["a", "b", "c", "d", "e", "e"]), folds=5, seed=0)


def test_recipes_differ_where_they_say() -> None:
    default, paper, published = (load_recipe(name) for name in ("default", "paper", "published"))
    assert paper.training.trained == "all"
    assert published == replace(
        paper,
        loss=replace(paper.loss, lonely_anchors="zero"),
        training=replace(paper.training, trained="embedding"),
    )
    assert default != paper
