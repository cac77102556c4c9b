"""The graphs' tensors as data: which output replaces which cache tensor."""

from __future__ import annotations

from make_synthetic_checkpoint import pixtral_12b
from pixtral_runtime.bundle.spec import GRAPHS, graph_spec


def test_each_cache_tensor_has_its_successor_layer_by_layer() -> None:
    spec = graph_spec("decoder", pixtral_12b(), "bfloat16", "int8")
    names = [(past.name, present.name) for past, present in spec.caches]
    assert names[:3] == [
        ("past_key_0", "present_key_0"),
        ("past_value_0", "present_value_0"),
        ("past_key_1", "present_key_1"),
    ]
    assert len(names) == 2 * pixtral_12b().decoder.n_layers
    assert {(past.shape, past.dtype) for past, _ in spec.caches} == {(("B", 8, "C", 128), "int8")}
    assert all((past.shape, past.dtype) == (present.shape, present.dtype) for past, present in spec.caches)


def test_the_pairs_are_the_end_of_inputs_and_outputs_and_only_the_decoder_has_any() -> None:
    for name in GRAPHS:
        spec = graph_spec(name, pixtral_12b(), "float16")
        plain = len(spec.inputs) - len(spec.caches), len(spec.outputs) - len(spec.caches)
        assert spec.inputs[plain[0] :] == tuple(past for past, _ in spec.caches)
        assert spec.outputs[plain[1] :] == tuple(present for _, present in spec.caches)
        assert plain == {"vision": (1, 1), "embed": (3, 1), "decoder": (4, 1)}[name]
        assert bool(spec.caches) == (name == "decoder")
