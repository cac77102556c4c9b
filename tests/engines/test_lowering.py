"""The graphs that TensorRT gets, in ONNX Runtime: what they compute is what the portable ones do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from helpers.bundles import exported
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_engines.lowered_graph import save_graphs
from pixtral_engines.lowering import _halves
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.errors import InputError

ROWS = 24
TOLERANCE = 1e-3  # of the largest logit; seen 2.1e-4 in int4, whose head is halved: float16 rounds each half
INT4 = ExportSettings(precision="int4", group_size=32, method="rtn")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("int4") / "b", INT4)


def run(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: v for k, v in feeds.items() if k in taken}), strict=True))


def test_a_saved_decoder_computes_what_the_portable_one_does(bundle: Bundle, tmp_path: Path) -> None:
    """A chunk and a step of two slots that stand at different rows."""
    save_graphs(bundle, tmp_path / "graphs", ROWS)
    draw, decoder = np.random.default_rng(3), bundle.model.decoder
    shape = (2, decoder.n_kv_heads, ROWS, decoder.head_dim)
    caches = bundle.graph_spec("decoder").caches
    cache = {past.name: draw.standard_normal(shape).astype(np.float16) for past, _ in caches}
    for tokens, start in ((5, np.array([0, 7])), (1, np.array([5, 12]))):
        feeds = cache | {
            "hidden": draw.standard_normal((2, tokens, decoder.dim)).astype(np.float16),
            "position_ids": start[:, None] + np.arange(tokens),
            "write_index": start,
            "logits_index": np.arange(2 * tokens),
            "inverse_temperature": np.ones(2 * tokens, np.float32),
        }
        seen = run(tmp_path / "graphs/decoder.onnx", feeds)
        expected = run(bundle.graph_path("decoder"), feeds)
        errors = {name: relative_error(seen[name], value) for name, value in expected.items()}
        assert max(errors.values()) < TOLERANCE, errors
        best = np.argsort(-seen["logits"], 1, kind="stable")[:, :64]
        np.testing.assert_array_equal(seen["picked"][:, 64:-1], best)


def test_halves_are_the_codes() -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    packed = _halves(codes)
    nibbles = np.stack([packed & 15, packed >> 4], 1).reshape(2, 16, 16).astype(np.int8)
    high, low = np.where(nibbles > 7, nibbles - 16, nibbles)
    np.testing.assert_array_equal(16 * high.astype(int) + low + 8, codes)


def test_graphs_are_saved_without_building_and_into_a_new_folder_only(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    line = ["build", str(bundle.path), "--target", "rtx:sm89", "--dry-run", "--save-onnx", str(folder)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert {"vision.onnx", "embed.onnx", "decoder.onnx", "weights.bin"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "weights.bin").samefile(bundle.path / "weights.bin")  # who changes one leaves the other
    with pytest.raises(InputError, match="is there and is no empty folder"):
        save_graphs(bundle, folder, ROWS)
    assert not (bundle.path / "engines").exists()
