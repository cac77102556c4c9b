"""Which number format each weight of a bundle gets: the recipes behind `pixtral export --precision`.

| recipe | decoder | its codes by | vision tower | runs on |
| --- | --- | --- | --- | --- |
| `int4` | int4 weights in groups along K | GPTQ, AWQ or rounding | int8 weights | CPU, SM80 and newer |
| `int8` | int8 weights and activations | SmoothQuant | the same | CPU, SM80 and newer |
| `fp8` | E4M3 weights and activations | GPTQ or rounding | the same | SM89 and newer |
| `nvfp4` | E2M1 weights in groups of 16, E4M3 scales | GPTQ, AWQ or rounding | int8 weights | SM120 |

int4 groups shrink to 64 or 32 in layers whose inputs they do not divide, unless the user chose their size. The token
embedding and the output head are int8 in blocks along D in every recipe; norms, biases, the patch
convolution, attention and the rotary tables keep the bundle's dtype. Where a checkpoint's decoder is published in a
recipe's own codes (`codes.py`), they are stored as they are, without samples.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pixtral_export.model.parameters import Parameter
from pixtral_export.quantization.formats import FORMATS, FP4, FP8, INT8
from pixtral_export.weight_names import global_scale_name, input_scale_name, scale_name
from pixtral_runtime.errors import Option, SettingError

GROUP_SIZES = (32, 64, 128)
METHODS_4_BIT = ("gptq", "awq", "rtn")
STORED = "stored"  # the method that takes a checkpoint's own codes and scales as they are
TABLE_BLOCK = 128  # of embedding and head; smaller where the width is no multiple
NVFP4_GROUP = 16  # fixed by the format
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored. `group` counts rows of K to a scale (of D for the embedding), None: one an output."""

    weight: str
    group: int | None = None
    activation: str | None = None  # the format its input is rounded to, by one static scale

    @property
    def is_coarse(self) -> bool:
        """Whether rounding costs enough for a choice of codes to be worth its time: of all formats but int8."""
        return self.weight != INT8.name


@dataclass(frozen=True)
class Recipe:
    """A scheme for each kind of weight. `keep` maps patterns of layer names to schemes of the user's choice."""

    name: str
    decoder: Scheme | None = None
    vision: Scheme | None = None
    tables: bool = False  # embedding and head in int8 blocks
    method: str = "rtn"  # how codes are chosen: rtn rounds; gptq, awq and smoothquant need samples
    kv_cache: str | None = None  # the format keys and values are cached in, by a static scale each layer
    keep: tuple[tuple[str, Scheme | None], ...] = field(default=())
    fits_groups: bool = False  # smaller groups where a layer's inputs are no multiple: nobody chose their size
    published: Mapping[str, Scheme] = field(default_factory=dict)  # of parameters whose codes a checkpoint holds

    @property
    def smooth(self) -> bool:
        """Whether outliers of activations move into weights."""
        return self.method == "smoothquant"

    @property
    def calibrated(self) -> bool:
        """Whether activations of samples must be seen."""
        if self.method == STORED:
            return self.kv_cache is not None
        activations = any(scheme is not None and scheme.activation for scheme in (self.decoder, self.vision))
        return activations or self.method != "rtn" or self.kv_cache is not None

    def needs_samples(self, scheme: Scheme | None) -> bool:
        """Whether samples decide how a layer is stored."""
        if scheme is None or self.method == STORED:
            return False
        return scheme.activation is not None or (scheme.is_coarse and self.method in ("gptq", "awq"))

    def scheme(self, parameter: Parameter) -> Scheme | None:
        """How a parameter is stored; None: in the bundle's dtype. Raises SettingError where a group does not fit."""
        scheme = self._scheme(parameter)
        if parameter.name == EMBEDDING and scheme is not None and scheme.weight != "int8":
            raise SettingError(
                "rows of an embedding can be gathered in int8 only", Option("keep", "tok_embeddings=int8")
            )
        if scheme is not None and scheme.group is not None and parameter.shape[1] % scheme.group:
            return self._fitted(parameter, scheme, scheme.group)
        return scheme

    def _fitted(self, parameter: Parameter, scheme: Scheme, group: int) -> Scheme:
        """The scheme with the largest group below that divides the parameter's inputs, unless a user chose its own."""
        layer, inputs = parameter.name.removesuffix(".weight"), parameter.shape[1]
        largest = max((size for size in GROUP_SIZES if size < group and inputs % size == 0), default=None)
        is_kept = any(fnmatch.fnmatchcase(layer, pattern) for pattern, _ in self.keep)
        if largest is not None and self.fits_groups and not is_kept:
            return replace(scheme, group=largest)
        remedies = [Option("keep", "PATTERN=DTYPE", "to leave this layer as it is")]
        if largest is not None:
            fitting = Option("keep", f"{layer}=int4-{largest}") if is_kept else Option("group_size", largest)
            remedies.insert(0, fitting)
        raise SettingError(f"{parameter.name} has {inputs} inputs, which groups of {group} do not divide", *remedies)

    def is_copy(self, parameter: Parameter) -> bool:
        """Whether a parameter is stored as another one that its tensor is too, so that the file need not hold it."""
        return parameter.copy_of == EMBEDDING and self.scheme(parameter) == self.scheme(
            replace(parameter, name=EMBEDDING, copy_of="")
        )

    def takes_codes(self, parameter: Parameter) -> bool:
        """Whether a parameter's codes are the checkpoint's own."""
        return parameter.name in self.published and self.scheme(parameter) is self.published[parameter.name]

    def fitted_groups(self, parameters: Iterable[Parameter]) -> dict[str, int]:
        """The group sizes of layers that the recipe's own does not divide, by name with * for its number."""
        fitted = {}
        for parameter in parameters:
            scheme, wanted = self.scheme(parameter), self._scheme(parameter)
            if scheme is not None and scheme.group is not None and scheme != wanted:
                fitted[re.sub(r"\.\d+\.", ".*.", parameter.name.removesuffix(".weight"))] = scheme.group
        return fitted

    def _scheme(self, parameter: Parameter) -> Scheme | None:
        if not parameter.is_linear and parameter.name != EMBEDDING:
            return None
        for pattern, scheme in self.keep:
            if fnmatch.fnmatchcase(parameter.name.removesuffix(".weight"), pattern):
                in_blocks = parameter.name == EMBEDDING and scheme == KEEP_SCHEMES["int8"]
                return _table(parameter) if in_blocks else scheme
        if parameter.name in self.published:
            return self.published[parameter.name]
        if parameter.name in (EMBEDDING, HEAD):
            return _table(parameter) if self.tables else None
        scheme = self.decoder if parameter.name.startswith("layers.") else self.vision
        # What a checkpoint with scales of inputs left as floats would take samples to find one for.
        return None if self.method == STORED and scheme is not None and scheme.activation else scheme


def plain(dtype: str) -> Recipe:
    """Every weight in the bundle's dtype."""
    return Recipe(dtype)


def int4(group_size: int, method: str) -> Recipe:
    """Weight-only int4 for the decoder: the one that fits a 12B on 12 GB, and decodes fastest where memory limits."""
    return Recipe("int4", Scheme("int4", group_size), Scheme("int8"), tables=True, method=method)


def int8(group_size: int, method: str) -> Recipe:
    """W8A8 after SmoothQuant (arXiv 2211.10438): static activation scales, one weight scale an output."""
    scheme = Scheme("int8", activation="int8")
    return Recipe("int8", scheme, scheme, tables=True, method=method)


def fp8(group_size: int, method: str) -> Recipe:
    """W8A8 in E4M3: static activation scales, one weight scale an output. Ada, Hopper, Blackwell and Thor."""
    scheme = Scheme("float8e4m3fn", activation="float8e4m3fn")
    return Recipe("fp8", scheme, scheme, tables=True, method=method)


def nvfp4(group_size: int, method: str) -> Recipe:
    """Weight-only E2M1 in groups of 16 with E4M3 scales and one float scale a tensor. Blackwell and Thor."""
    return Recipe("nvfp4", Scheme("float4e2m1", group_size), Scheme("int8"), tables=True, method=method)


@dataclass(frozen=True)
class RecipeKind:
    """A recipe before the user's choices, and what there is to choose."""

    make: Callable[[int, str], Recipe]
    methods: tuple[str, ...]  # the first is the recipe's own
    group_sizes: tuple[int, ...] = ()  # none: one scale an output
    own_group_size: int = 0


RECIPES = {
    "int4": RecipeKind(int4, METHODS_4_BIT, GROUP_SIZES, 128),
    "int8": RecipeKind(int8, ("smoothquant",)),
    "fp8": RecipeKind(fp8, ("gptq", "rtn")),
    "nvfp4": RecipeKind(nvfp4, METHODS_4_BIT, (NVFP4_GROUP,), NVFP4_GROUP),
}
KV_CACHES = ("int8",)
KEEP_SCHEMES: dict[str, Scheme | None] = {
    "int8": Scheme("int8"),
    "fp8": Scheme("float8e4m3fn"),
    **{f"int4-{size}": Scheme("int4", size) for size in GROUP_SIZES},
}
"""What `--keep PATTERN=` may name besides the bundle's dtype: weight-only schemes, which need no calibration."""


def make_recipe(
    precision: str,
    dtype: str,
    *,
    group_size: int | None = None,
    method: str | None = None,
    keep: Iterable[str] = (),
    kv_cache: str | None = None,
    published: Mapping[str, Scheme] = MappingProxyType({}),
) -> Recipe:
    """The recipe a user asks for; None takes the recipe's own. `keep` holds `PATTERN=DTYPE`.

    `published` are the schemes of a checkpoint's own codes, by parameter: where they are those of the recipe's decoder,
    they are kept unless another method or group size is asked for. Raises SettingError on a name that does not exist,
    and on a method or a group size that the recipe does not have.
    """
    if precision != dtype and precision not in RECIPES:
        raise SettingError(f"no precision '{precision}'", Option("precision", (dtype, *RECIPES)))
    kind = RECIPES.get(precision, RecipeKind(lambda *_: plain(dtype), ()))
    _refuse_other(Option("group_size", kind.group_sizes), group_size, precision, GROUP_SIZES)
    if method != STORED:
        _refuse_other(Option("method", kind.methods), method, precision, METHODS_4_BIT)
    recipe = kind.make(group_size or kind.own_group_size, method or next(iter(kind.methods), "rtn"))
    fitting = {
        name: scheme
        for name, scheme in published.items()
        if name.startswith("layers.")
        and recipe.decoder is not None
        and (scheme.weight, scheme.activation) == (recipe.decoder.weight, recipe.decoder.activation)
        and (scheme.group == group_size if group_size else scheme.group in (None, *kind.group_sizes))
    }
    if method == STORED and not fitting:
        raise SettingError(
            f"the checkpoint holds no codes of {precision} that could be kept", Option("method", kind.methods)
        )
    if fitting and method in (None, STORED):
        recipe = replace(recipe, method=STORED, published=fitting)
    if kv_cache not in (None, dtype, *KV_CACHES):
        raise SettingError(
            f"no KV cache in '{kv_cache}': neither ONNX Runtime's cache operator nor TensorRT's takes it",
            Option("kv_cache", (dtype, *KV_CACHES)),
        )
    schemes = {dtype: None, **KEEP_SCHEMES}
    kept = []
    for entry in keep:
        pattern, equals, name = entry.partition("=")
        if not equals or name not in schemes:
            raise SettingError(
                f"{entry} is not PATTERN=DTYPE with a DTYPE of {', '.join(schemes)}",
                Option("keep", f"layers.*.feed_forward.w2={dtype}"),
            )
        kept.append((pattern, schemes[name]))
    return replace(
        recipe,
        keep=tuple(kept),
        kv_cache=None if kv_cache == dtype else kv_cache,
        fits_groups=group_size is None,
    )


def _refuse_other(own: Option, wish: object, precision: str, int4: Sequence[object]) -> None:
    """Raise SettingError for a choice that a precision does not have: it has those of `own`, and int4 has `int4`."""
    choices = own.value if isinstance(own.value, tuple) else ()
    if wish is None or wish in choices:
        return
    words = own.name.replace("_", " ")
    remedies: list[Option | str] = [own if choices else f"leave the {words} away"]
    if precision != "int4" and wish in int4:
        remedies.append(Option("precision", "int4"))
    only = f"; it has {', '.join(map(str, choices))}" if choices else ", and would do nothing"
    raise SettingError(f"{precision} has no {words} {wish}{only}", *remedies)


def check_patterns(recipe: Recipe, parameters: Iterable[Parameter]) -> None:
    """Raise SettingError for a pattern to keep that decides no weight: a typo would silently quantize."""
    names = [p.name.removesuffix(".weight") for p in parameters if p.is_linear or p.name == EMBEDDING]
    open_names = names
    for pattern, _ in recipe.keep:
        if not fnmatch.filter(names, pattern):
            raise SettingError(
                f"the pattern {pattern} names no layer; layers are called {names[0]}, {names[-2]}, {names[-1]}",
                Option("keep", "layers.0.*=float16"),
            )
        decided = set(fnmatch.filter(open_names, pattern))
        if not decided:
            raise SettingError(
                f"the pattern {pattern} would do nothing: patterns before it fit all its layers, and the first decides",
                f"name {pattern} first, or leave it away",
            )
        open_names = [name for name in open_names if name not in decided]


@dataclass(frozen=True)
class Stored:
    """A tensor of the weight file."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.ceil(math.prod(self.shape) * _bits(self.dtype) / 8)


def stored_tensors(parameter: Parameter, scheme: Scheme | None, dtype: str) -> list[Stored]:
    """What a parameter becomes in the weight file, in this order: codes or values, scales, and its input's scale."""
    shape = parameter.shape[::-1] if parameter.is_linear else parameter.shape
    if scheme is None:
        return [Stored(parameter.name, shape, dtype)]
    codes = Stored(parameter.name, shape, scheme.weight)
    if parameter.name == EMBEDDING:
        assert scheme.group is not None
        return [codes, Stored(scale_name(parameter.name), (shape[0], shape[1] // scheme.group), dtype)]
    scales = shape[1:] if scheme.group is None else (shape[0] // scheme.group, shape[1])
    if scheme.weight == FP4.name:
        return [
            codes,
            Stored(scale_name(parameter.name), scales, FP8.name),
            Stored(global_scale_name(parameter.name), (), dtype),
        ]
    if scheme.activation is None:
        return [codes, Stored(scale_name(parameter.name), scales, dtype)]
    return [
        codes,
        Stored(scale_name(parameter.name), scales, "float32"),
        Stored(input_scale_name(parameter.name), (), "float32"),
    ]


def _table(parameter: Parameter) -> Scheme:
    """int8 in blocks along D."""
    return Scheme("int8", math.gcd(parameter.shape[1], TABLE_BLOCK))


def _bits(dtype: str) -> int:
    if dtype in FORMATS:
        return FORMATS[dtype].bits
    return {"float32": 32, "float16": 16, "bfloat16": 16}[dtype]
