"""Figures: the lines, bands and words in them, the files they go to, and their specs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from gossamer.errors import ConfigError, StorageError
from gossamer.reports.curves import Curve, find_runs, group
from gossamer.reports.plots import FigureOptions, PanelOptions, draw, plot


def record(round: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {
        "round": round,
        "wall_seconds": 2.0 * round,
        "simulated_seconds": 3600.0 * round,
        "total_bytes_up": 1_000_000 * round,
        "total_bytes_down": 3_000_000 * round,
        "total_client_flops": 5e12 * round,
        "train_loss": 2.0 / round,
        "accuracy": accuracy,
        **more,
    }


def write_run(directory: Path, records: Sequence[Mapping[str, Any]], name: str = "digits", seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"name": name, "seed": seed}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def write_experiment(directory: Path, methods: Sequence[str], seeds: Sequence[int], num_rounds: int = 6) -> Path:
    """Write methods x seeds whose curves differ."""
    directory.mkdir(parents=True)
    (directory / "experiment.yaml").write_text("rounds: 6\n")
    for index, method in enumerate(methods):
        for seed in seeds:
            random = np.random.default_rng([index, seed])
            records = [
                record(n, float(random.uniform(0.1, 0.9)), wall_seconds=float(n * random.uniform(1, 2)))
                for n in range(1, num_rounds + 1)
            ]
            run = write_run(
                directory / method / f"seed-{seed}", sorted(records, key=lambda r: r["round"]), method, seed
            )
            (run / "environment.json").write_text(json.dumps({"started": f"2025-01-01T00:00:{index:02}"}))
    return directory


def curves_of(*directories: Path) -> list[Curve]:
    return group(find_runs(directories))


def figure_of(directory: Path, **panel: Any) -> Figure:
    return draw(curves_of(directory), FigureOptions(panels=[PanelOptions(**panel)]))


def note_of(figure: Figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")


def band_limits(band: Any) -> dict[float, tuple[float, float]]:
    """Return the lowest and highest vertex of a band at each x."""
    assert isinstance(band, PolyCollection)
    found: dict[float, list[float]] = {}
    for x, y in np.asarray(band.get_paths()[0].vertices):
        found.setdefault(float(x), []).append(float(y))
    return {x: (min(ys), max(ys)) for x, ys in found.items()}


class TestFigure:
    def test_peers_are_not_called_seeds(self, tmp_path: Path) -> None:
        for peer in range(3):
            where = write_run(tmp_path / f"peer-{peer}", [record(n, 0.1 * (n + peer)) for n in range(1, 5)])
            config = yaml.safe_load((where / "config.yaml").read_text()) | {"engine": {"name": "network", "peer": peer}}
            (where / "config.yaml").write_text(yaml.safe_dump(config))
        figure = figure_of(tmp_path)
        assert note_of(figure) == "lines: mean over 3 peers, bands: lowest to highest peer"
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["digits"]

    def test_lines_bands_and_words(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg", "heterofl"], [0, 1, 2])
        figure = figure_of(experiment)
        (ax,) = figure.axes
        assert [line.get_label() for line in ax.lines] == ["fedavg", "heterofl"]
        assert (
            len({line.get_color() for line in ax.lines}) == len({str(line.get_linestyle()) for line in ax.lines}) == 2
        )
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedavg", "heterofl"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("Round", "Test accuracy (%)")
        assert note_of(figure) == "lines: mean over 3 seeds, bands: lowest to highest seed"
        for curve, line, band in zip(curves_of(experiment), ax.lines, ax.collections, strict=True):
            for number, (low, high) in band_limits(band).items():
                values = [r["accuracy"] for run in curve.runs for r in run.records if r["round"] == number]
                assert (low, high) == pytest.approx((min(values), max(values)))
                assert np.asarray(line.get_ydata())[int(number) - 1] == pytest.approx(sum(values) / 3)

    def test_one_seed_has_no_band_and_needs_no_note(self, tmp_path: Path) -> None:
        figure = figure_of(write_experiment(tmp_path / "exp", ["fedavg"], [0]))
        assert len(figure.axes[0].lines) == 1
        assert len(figure.axes[0].collections) == 0
        assert note_of(figure) == ""

    def test_unequal_numbers_of_seeds_stand_in_the_legend(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg", "heterofl"], [0, 1])
        (experiment / "heterofl" / "seed-1" / "metrics.jsonl").write_text("")
        figure = figure_of(experiment)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedavg (2 seeds)", "heterofl (1 seed)"]

    @pytest.mark.parametrize(
        ("x", "label", "last"),
        [
            ("seconds", "Wall-clock time (s)", 12.0),
            ("simulated", "Simulated time (h)", 6.0),
            ("bytes", "Communication, up and down (MB)", 24.0),
            ("flops", "Client computation (TFLOP)", 30.0),
        ],
    )
    def test_x_axes_and_their_units(self, tmp_path: Path, x: str, label: str, last: float) -> None:
        run = write_run(tmp_path / "run", [record(n, 0.1 * n) for n in range(1, 7)])
        (ax,) = figure_of(run, x=x).axes
        assert ax.get_xlabel() == label
        assert np.asarray(ax.lines[0].get_xdata())[-1] == pytest.approx(last)

    @pytest.mark.parametrize(
        ("x", "label"),
        [
            ("flops", "Client computation, incomplete (TFLOP)"),
            ("simulated", "Simulated time, incomplete (h)"),
            ("bytes", "Communication, up and down (MB)"),
        ],
    )
    def test_counts_of_operations_that_leave_some_out_are_marked(self, tmp_path: Path, x: str, label: str) -> None:
        write_run(tmp_path / "run", [record(n, 0.5, num_uncounted_operations=1) for n in range(1, 4)])
        assert figure_of(tmp_path, x=x).axes[0].get_xlabel() == label

    def test_bands_are_scaled_like_their_lines(self, tmp_path: Path) -> None:
        (ax,) = figure_of(write_experiment(tmp_path / "exp", ["fedavg"], [0, 1]), x="bytes").axes
        assert sorted({min(band_limits(ax.collections[0])), max(band_limits(ax.collections[0]))}) == pytest.approx(
            [4, 24]
        )
        assert np.asarray(ax.lines[0].get_xdata())[[0, -1]] == pytest.approx([4, 24])

    def test_interpolation_and_cuts_are_stated(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg"], [0, 1])
        assert "seeds are interpolated on a common grid" in note_of(figure_of(experiment, x="seconds"))
        longer = write_experiment(tmp_path / "longer", ["fedavg"], [2], num_rounds=9) / "fedavg" / "seed-2"
        longer.rename(experiment / "fedavg" / "seed-2")
        for x, (common, last) in {"round": (6, 9), "bytes": (24, 36)}.items():
            figure = figure_of(experiment, x=x)
            assert "pale: some seed has ended before, or begins later" in note_of(figure)
            whole, pale = figure.axes[0].lines
            drawn = [np.asarray(line.get_xdata())[np.isfinite(line.get_ydata())] for line in (whole, pale)]
            assert drawn[0][-1] == pytest.approx(common)
            assert drawn[1][[0, -1]] == pytest.approx([common, last])  # joined to the rest
            assert (pale.get_color(), pale.get_alpha()) == (whole.get_color(), 0.4)
            assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fedavg"]

    def test_default_metric_is_accuracy_else_training_loss(self, tmp_path: Path) -> None:
        entries = [{k: v for k, v in record(n, 0.5).items() if k != "accuracy"} for n in (1, 2)]
        (ax,) = figure_of(write_run(tmp_path / "run", entries)).axes
        assert ax.get_ylabel() == "Training loss"
        assert np.asarray(ax.lines[0].get_ydata()).tolist() == [2.0, 1.0]

    def test_nested_metric_with_a_dot_in_its_key(self, tmp_path: Path) -> None:
        nested = [record(n, 0.5, accuracy_by_capacity={"0.25": 0.1 * n, "1": 0.9}) for n in (1, 2)]
        (ax,) = figure_of(write_run(tmp_path / "run", nested), metric="accuracy_by_capacity.0.25").axes
        assert np.asarray(ax.lines[0].get_ydata()) == pytest.approx([0.1, 0.2])
        assert ax.get_ylabel() == "Accuracy at capacity 0.25 (%)"

    def test_percent_only_for_shares(self, tmp_path: Path) -> None:
        (ax,) = figure_of(write_run(tmp_path / "run", [record(n, 40.0 + n) for n in (1, 2)])).axes
        assert ax.get_ylabel() == "Test accuracy"

    def test_rounds_without_the_metric_are_skipped(self, tmp_path: Path) -> None:
        entries = [record(1, None), record(2, 0.2), record(3, None), record(4, 0.4)]
        (ax,) = figure_of(write_run(tmp_path / "run", entries)).axes
        assert np.asarray(ax.lines[0].get_xdata()).tolist() == [2, 4]

    def test_a_curve_without_the_metric_is_named(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", [record(1, 0.5, consensus=1.0)], name="peers")
        write_run(tmp_path / "b", [record(1, 0.5)], name="fedavg")
        figure = figure_of(tmp_path, metric="consensus")
        assert [line.get_label() for line in figure.axes[0].lines] == ["peers"]
        assert "without consensus: fedavg" in note_of(figure)

    def test_unknown_metric_names_the_nearest(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(1, 0.5)])
        with pytest.raises(
            ConfigError, match=r"no record has a number 'acuracy'; did you mean 'accuracy'\?.*train_loss"
        ):
            figure_of(run, metric="acuracy")

    def test_logs_without_the_x_axis(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [{"round": 1, "accuracy": 0.5}])
        with pytest.raises(ConfigError, match="x = 'flops' needs 'total_client_flops'"):
            figure_of(run, x="flops")

    @pytest.mark.parametrize("num_curves", [1, 3, 9])
    @pytest.mark.parametrize("title", [None, "A title"])
    def test_the_legend_covers_no_data_and_fits(self, tmp_path: Path, num_curves: int, title: str | None) -> None:
        for index in range(num_curves):
            write_run(tmp_path / f"{index}", [record(n, 0.1 * n) for n in (1, 2)], name=f"federated-dropout-{index}")
        panels = [PanelOptions(title="left"), PanelOptions(x="bytes")]
        figure = draw(curves_of(tmp_path), FigureOptions(panels=panels, title=title))
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.width
        assert legend.y1 <= figure.bbox.height + 1
        for ax in figure.axes:
            extent = ax.get_tightbbox()
            assert extent is not None
            assert extent.y1 <= legend.y0 + 1
            assert extent.height > 150  # and room is left for the data
        assert figure.legends[0].get_title().get_text() == (title or "")


class TestFile:
    @pytest.mark.parametrize(
        ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")]
    )
    def test_formats_and_equal_bytes(self, tmp_path: Path, suffix: str, start: bytes) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg", "heterofl"], [0, 1])
        files = [plot([experiment], "bytes", None, tmp_path / "new" / f"{name}.{suffix}") for name in ("a", "b")]
        first, second = (file.read_bytes() for file in files)
        assert first.startswith(start)
        assert first == second

    @pytest.mark.parametrize("name", ["curve.jpeg", "curve"])
    def test_unknown_format(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=r"cannot tell the format of .*\.png, \.svg or \.pdf"):
            plot([tmp_path], None, None, tmp_path / name)

    def test_path_that_cannot_be_written(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(1, 0.5)])
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot write"):
            plot([run], None, None, tmp_path / "file" / "curve.png")

    def test_unknown_x(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(1, 0.5)])
        with pytest.raises(ConfigError, match="x = 'second': input should be 'round', 'seconds'"):
            plot([run], "second", None, tmp_path / "curve.png")

    def test_neither_training_code_nor_global_plot_state_is_loaded(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(1, 0.5)])
        program = (
            "import sys, gossamer.reports.plots; assert 'matplotlib' not in sys.modules;"
            f"gossamer.reports.plots.plot([{str(run)!r}], None, None, {str(tmp_path / 'a.png')!r});"
            "print([m for m in ('torch', 'ray', 'gossamer.rounds', 'matplotlib.pyplot') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False
        )
        assert (done.stdout, done.stderr) == ("[]\n", "")


class TestSpec:
    @staticmethod
    def draw_spec(tmp_path: Path, spec: Any) -> Path:
        run = write_run(tmp_path / "run", [record(n, 0.1 * n) for n in (1, 2)])
        path = tmp_path / "plot.yaml"
        path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec))
        return plot([run], None, None, tmp_path / "curve.png", path)

    def test_panels_side_by_side(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(n, 0.1 * n) for n in (1, 2)])
        options = FigureOptions(
            panels=[PanelOptions(title="left", y_min=0, y_max=0.5), PanelOptions(metric="train_loss", x="bytes")],
            size=(7, 2),
        )
        figure = draw(curves_of(run), options)
        left, right = figure.axes
        assert (left.get_title(), right.get_title()) == ("left", "")
        assert left.get_ylim() == (0, 0.5)
        assert (right.get_xlabel(), right.get_ylabel()) == ("Communication, up and down (MB)", "Training loss")
        assert figure.get_size_inches().tolist() == [7, 2]
        assert len(figure.legends) == 1

    def test_logarithmic_axes(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(n, 0.1 * n) for n in (1, 2)])
        for log_x, log_y in ((False, False), (True, False), (False, True)):
            (ax,) = figure_of(run, x="bytes", log_x=log_x, log_y=log_y).axes
            assert (ax.get_xscale(), ax.get_yscale()) == tuple("log" if log else "linear" for log in (log_x, log_y))

    def test_a_logarithmic_axis_ends_where_it_is_told(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [record(n, 10.0**-n) for n in range(1, 20)])
        (ax,) = figure_of(run, log_y=True, y_min=1e-8).axes
        assert ax.get_ylim()[0] == 1e-8
        assert np.asarray(ax.lines[0].get_ydata())[-1] == 1e-19

    def test_each_panel_draws_the_methods_it_names(self, tmp_path: Path) -> None:
        for name in ("ring", "grid", "torus", "star"):
            write_run(tmp_path / name, [record(n, 0.1 * n) for n in (1, 2)], name=name)
        panels = [PanelOptions(methods=["ring", "grid"]), PanelOptions(methods=["grid", "torus"])]
        figure = draw(curves_of(tmp_path), FigureOptions(panels=panels))
        found = [{str(line.get_label()): line.get_color() for line in ax.lines} for ax in figure.axes]
        assert [sorted(lines) for lines in found] == [["grid", "ring"], ["grid", "torus"]]
        assert found[0]["grid"] == found[1]["grid"]
        assert len({*found[0].values(), *found[1].values()}) == 3
        assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["grid", "ring", "torus"]
        assert note_of(figure) == ""
        with pytest.raises(ConfigError, match="no curve 'rings'; did you mean 'ring'"):
            draw(curves_of(tmp_path), FigureOptions(panels=[PanelOptions(methods=["rings"])]))

    @pytest.mark.parametrize("num_curves", [10, 14])
    def test_curves_can_be_told_apart(self, tmp_path: Path, num_curves: int) -> None:
        for index in range(num_curves):
            write_run(tmp_path / f"{index}", [record(n, 0.1 * n) for n in (1, 2, 3)], name=f"method-{index}")
        (ax,) = figure_of(tmp_path).axes
        assert len({(line.get_color(), repr(line._dash_pattern)) for line in ax.lines}) == num_curves

    def test_two_points_are_markers(self, tmp_path: Path) -> None:
        for name in ("ring", "grid"):
            for seed in (0, 1):
                records = [record(n, 0.1 * n + 0.1 * seed, wall_seconds=n + seed) for n in (1, 2)]
                write_run(tmp_path / name / f"seed-{seed}", records, name, seed)
            (tmp_path / name / "experiment.yaml").write_text("rounds: 2\n")
        for x in ("round", "seconds"):
            (ax,) = figure_of(tmp_path, x=x).axes
            assert {line.get_linestyle() for line in ax.lines} == {"None"}
            assert len({line.get_marker() for line in ax.lines}) == 2
            ranges = [[y for _, y in segment] for segment in ax.collections[0].get_segments()]
            assert np.array(ranges) == pytest.approx(np.array([[0.1, 0.2], [0.2, 0.3]]))

    def test_axes_become_logarithmic_where_values_span_decades(self, tmp_path: Path) -> None:
        for index, factor in enumerate((1, 1000)):
            records = [
                record(n, 0.001 * n, loss=10.0**-n, total_bytes_up=n * factor, total_bytes_down=0) for n in (1, 9)
            ]
            write_run(tmp_path / str(index), records, name=str(index), seed=index)
        expected = {("loss", "round"): "linear log", ("accuracy", "bytes"): "log linear", ("loss", "bytes"): "log log"}
        for (metric, x), scales in expected.items():
            figure = figure_of(tmp_path, metric=metric, x=x)
            assert f"{figure.axes[0].get_xscale()} {figure.axes[0].get_yscale()}" == scales
        (ax,) = figure_of(tmp_path, metric="loss", x="bytes", log_x=False, y_min=0).axes
        assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")

    def test_the_note_tells_geometric_means(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg"], [0, 1])
        assert "lines: geometric mean over 2 seeds" in note_of(figure_of(experiment, log_y=True))
        panels = [PanelOptions(log_y=True), PanelOptions()]
        mixed = draw(curves_of(experiment), FigureOptions(panels=panels))
        assert "lines: mean (geometric where y is logarithmic) over 2 seeds" in note_of(mixed)

    def test_a_reference_line(self, tmp_path: Path) -> None:
        runs = [write_run(tmp_path / str(n), [record(1, 0.5, chance=0.1 * n)], seed=n) for n in (1, 3)]
        (ax,) = draw(curves_of(*runs), FigureOptions(panels=[PanelOptions(reference="chance")])).axes
        assert ax.lines[-1].get_ydata()[0] == pytest.approx(0.2)
        with pytest.raises(ConfigError, match="no record has the reference 'chanse'; did you mean 'chance'"):
            draw(curves_of(*runs), FigureOptions(panels=[PanelOptions(reference="chanse")]))

    def test_from_a_file(self, tmp_path: Path) -> None:
        drawn = self.draw_spec(
            tmp_path, {"title": "t", "size": [2, 2], "panels": [{"metric": "train_loss", "x": "flops"}]}
        )
        width, height = np.frombuffer(drawn.read_bytes()[16:24], dtype=">u4")
        assert (width, height) == (400, 400)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ({"panels": [{"metrc": "loss"}]}, r"plot\.yaml: unknown key 'panels\.0\.metrc'"),
            ({"panels": []}, "panels = "),
            ({}, "missing key 'panels'"),
            ({"panels": [{"y_min": 1, "y_max": 0}]}, "y_min 1.0 is not below y_max 0.0"),
            ({"panels": [{"y_min": 0, "log_y": True}]}, "y_min 0.0 is not on a logarithmic axis"),
            ({"panels": [{}], "size": [0.1, 3]}, "between 1 and 100 inches"),
            ("- a list", "must be a mapping"),
            ("{", "not valid YAML"),
        ],
    )
    def test_wrong_specs(self, tmp_path: Path, spec: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.draw_spec(tmp_path, spec)

    def test_missing_file_and_contradiction(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot read the plot's spec"):
            plot([tmp_path], None, None, "a.png", tmp_path / "none.yaml")
        with pytest.raises(ConfigError, match="either a spec, or x and metric"):
            plot([tmp_path], "bytes", None, "a.png", tmp_path / "none.yaml")
