"""Does a bundle compute here what its certificate says it computed where it was made?

The stages stand in the order in which data flows, so the first that differs is where to look. Each is fed by the one
before, the decoder with the certificate's own answers: what differs in one token does not hide the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pixtral_runtime.bundle.certificate import Certificate, KnownAnswer, known_engines
from pixtral_runtime.bundle.engine_list import listed_engines, open_engines, verify_engines
from pixtral_runtime.bundle.integrity import verify_bundle
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.replay import Predicted, Replay, Replayed
from pixtral_runtime.compare.sketch import distance
from pixtral_runtime.errors import BundleError, EngineError, PixtralError, Remedy, StaleEngineError
from pixtral_runtime.generation.model import Model, load_bundle
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class Tolerance:
    """How far a tensor may be from its sketch, as a share of its norm, and a logit from its own, in nats.

    Two tokens whose logits are nearer than that are a tie: either may be chosen.
    """

    share: float
    nats: float


PIXELS = 2e-3
"""Of the preprocessing. Seen 0; other versions of OpenCV and Pillow may round a value of 255 the other way."""
TOLERANCES = {
    "float32": Tolerance(1e-3, 0.01),  # seen 3e-5 and 1e-5
    "float16": Tolerance(8e-3, 0.05),  # seen 3e-3 and 1e-2
    "bfloat16": Tolerance(3e-2, 0.4),  # 8 times as coarse as float16
    "rounded": Tolerance(8e-2, 0.8),  # seen 4e-2 and 0.32
}
"""By the coarsest numbers that are multiplied. Seen, on the demo checkpoint: the networks that TensorRT parsed, run in
NumPy, and ONNX Runtime without its rewritten graphs and fused kernels, which for int4 is float32 against 8 bits. At
any number of threads and slots, in ONNX Runtime 1.31 and 1.32, all was the same to the last bit but for fp8 and int8
caches.
"""


@dataclass(frozen=True)
class StageCheck:
    """One stage. `worst` is the largest difference, `fault` what differs, empty where nothing does."""

    stage: str
    compared: int
    worst: float = 0.0
    tolerance: float = 0.0
    fault: str = ""
    remedies: tuple[Remedy, ...] = ()
    case: str = ""  # whose the worst difference is

    @property
    def passed(self) -> bool:
        return not self.fault


def tolerance_of(bundle: Bundle) -> Tolerance:
    is_rounded = bundle.precision != bundle.dtype or bundle.kv_cache is not None
    return TOLERANCES["rounded" if is_rounded else bundle.dtype]


def verify(
    bundle: Bundle, certificate: Certificate, backend: str = "auto", *, threads: int = 0, batch: int = 1
) -> Iterator[StageCheck]:
    """Replay a certificate stage by stage; the first that differs is the last. `batch`: pictures and answers at a time.

    Raises MachineError where the backend cannot run here.
    """
    for check in _checks(bundle, certificate, backend, threads, batch):
        yield check
        if not check.passed:
            return


def _checks(bundle: Bundle, known: Certificate, backend: str, threads: int, batch: int) -> Iterator[StageCheck]:
    yield _files(bundle)
    yield _engines(bundle, known)
    replay = Replay(PromptBuilder(bundle, default_preprocess(bundle)))
    try:
        yield _tokens(replay, known)
    except BundleError as error:
        yield _broken("tokenizer", error)
    closer = (f"pixtral check {bundle.path} --against CHECKPOINT", f"pixtral inspect {bundle.path} --verify")
    newer = ("pixtral doctor, and compare its versions with the certificate's", *closer[1:])
    yield _tensors(replay.pixels(), known, PIXELS, newer)
    if known.omitted:
        return
    try:
        model = load_bundle(bundle, replay.builder, threads=threads, backend=backend, slots=batch)
    except BundleError as error:
        yield _broken("graphs", error)
        return
    yield StageCheck(f"graphs, {model.backend.partition(':')[0]}", 3)
    yield from _numbers(model, replay, known, batch, closer)


def _numbers(
    model: Model, replay: Replay, known: Certificate, batch: int, closer: tuple[str, ...]
) -> Iterator[StageCheck]:
    if set(known.answers) != set(replay.prompts):
        yield StageCheck("answers", 0, fault="the certificate has answers to other prompts", remedies=closer)
        return
    allowed = tolerance_of(model.bundle)
    said = {name: answer.token_ids for name, answer in known.answers.items()}
    predicted: list[Predicted] = []

    def decoded() -> Iterator[Replayed]:
        for one in replay.decoded(model, said):
            if isinstance(one, Replayed):
                yield one
            else:
                predicted.append(one)

    stages: dict[str, Callable[[], StageCheck]] = {
        "vision": lambda: _tensors(replay.features(model, batch), known, allowed.share, closer),
        "embed": lambda: _tensors(replay.embedded(model), known, allowed.share, closer),
        "decoder": lambda: _tensors(decoded(), known, allowed.share, closer),
        "logits": lambda: _logits(predicted, known, allowed.nats, closer),
        "answers": lambda: _answers(replay.said(model, batch), known, allowed.nats, closer),
        "headroom": lambda: _headroom(model.bundle, known),
    }
    for stage, check in stages.items():
        try:
            yield check()
        except BundleError as error:  # a graph that loads and cannot be computed
            yield _broken(stage, error)


def _files(bundle: Bundle) -> StageCheck:
    try:
        return StageCheck("files", sum(1 for _ in verify_bundle(bundle)))
    except BundleError as error:
        return _broken("files", error)


def _engines(bundle: Bundle, known: Certificate) -> StageCheck:
    """Whether each engine is the file that was written, from these graphs, and the one of the certificate."""
    try:
        for target in bundle.engines:
            engines = listed_engines(bundle, target)
            if "@" not in target:
                open_engines(bundle, target, engines.tensorrt)
            verify_engines(bundle, engines)
            theirs = known.engines.get(target)
            if theirs is None or known_engines(engines, theirs.network) != theirs:
                raise StaleEngineError(
                    f"the engines for {target} are not those of the certificate",
                    f"pixtral build {bundle.path} --target {target.partition('@')[0]}",
                )
        if gone := sorted(set(known.engines) - set(bundle.engines)):
            raise EngineError(f"the certificate has engines for {gone[0]}, the bundle has none", "copy it whole again")
    except EngineError as error:
        return _broken("engines", error)
    return StageCheck("engines", len(bundle.engines))


def _tokens(replay: Replay, known: Certificate) -> StageCheck:
    seen = replay.texts()
    hint = f"pixtral inspect {replay.builder.bundle.path} --verify", "pip install --upgrade mistral-common"
    for name, ids in known.tokens.items():
        if (ours := seen.get(name, ())) != ids:
            place = next(
                (n for n, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), min(len(ours), len(ids))
            )
            fault = f"'{name}' has {len(ours)} tokens, {len(ids)} are known; token {place} is the first that differs"
            return StageCheck("tokenizer", len(seen), 1, 0, fault, hint, name)
    return StageCheck("tokenizer", len(seen))


def _tensors(seen: Iterable[Replayed], known: Certificate, allowed: float, remedies: tuple[Remedy, ...]) -> StageCheck:
    """A stage's tensors in their order: the first that differs is named, not the one that differs most."""
    worst, case, compared, stage = 0.0, "", 0, ""
    names = set[str]()
    for one in seen:
        stage, compared = one.stage, compared + 1
        names.add(one.name)
        expected = known.tensors.get(stage, {}).get(one.name)
        apart = float("inf") if expected is None else distance(one.sketch, expected)
        if apart > worst:
            worst, case = apart, one.name
        if not apart <= allowed:
            if expected is None:
                fault = f"{one.name} is not in the certificate"
            elif one.sketch.shape != expected.shape:
                fault = f"{one.name} has shape {one.sketch.shape}, {expected.shape} is known"
            else:
                fault = f"{one.name} differs by {apart:.1e} of its norm, {allowed:.0e} is allowed"
            return StageCheck(stage, compared, apart, allowed, fault, remedies, one.name)
    absent = sorted(set(known.tensors.get(stage, {})) - names)
    fault = f"{absent[0]} is in the certificate and was not computed here" if absent else ""
    return StageCheck(stage, compared, worst, allowed, fault, remedies if fault else (), case)


def _logits(seen: Iterable[Predicted], known: Certificate, allowed: float, remedies: tuple[Remedy, ...]) -> StageCheck:
    """The likeliest tokens' logits at each position of the known answers."""
    worst, case, compared = 0.0, "", 0
    for one in seen:
        answer = known.answers[one.name]
        for place, (ids, logits) in enumerate(zip(answer.top_ids, answer.top_logits, strict=True)):
            apart = max(abs(float(one.logits[place, token]) - logit) for token, logit in zip(ids, logits, strict=True))
            compared += 1
            if not apart <= worst:
                worst, case = apart, f"{one.name}, token {place}"
    fault = f"{case} differs by {worst:.2f} nats, {allowed} is allowed" if not worst <= allowed else ""
    return StageCheck("logits", compared, worst, allowed, fault, remedies if fault else (), case)


def _answers(
    seen: Mapping[str, tuple[int, ...]], known: Certificate, tie: float, remedies: tuple[Remedy, ...]
) -> StageCheck:
    """Whether greedy answers are the known ones, up to the first token that was nearly a tie."""
    worst, case = 0.0, ""
    for name, tokens in seen.items():
        place, gap = _parting(tokens, known.answers[name])
        if gap > worst:
            worst, case = gap, f"{name}, token {place}"
    fault = (
        f"{case} is another one, which the known one led by {worst:.2f} nats; {tie} is no tie" if worst > tie else ""
    )
    return StageCheck("answers", len(seen), worst, tie, fault, remedies if fault else (), case)


def _parting(tokens: tuple[int, ...], known: KnownAnswer) -> tuple[int, float]:
    """Where an answer leaves the known one, and by how much the token there led the next; 0 where it does not."""
    for place, (ours, theirs) in enumerate(zip(tokens, known.token_ids, strict=False)):
        if ours != theirs:
            logits = dict(zip(known.top_ids[place], known.top_logits[place], strict=True))
            return place, logits.get(theirs, float("inf")) - logits.get(ours, min(logits.values()))
    return 0, 0.0 if len(tokens) == len(known.token_ids) else float("inf")


def _headroom(bundle: Bundle, known: Certificate) -> StageCheck:
    """Whether float16 holds what the layers were seen to make."""
    graph, found = max(known.headroom.items(), key=lambda item: item[1].largest, default=("", None))
    if found is None or bundle.dtype != "float16":
        return StageCheck("headroom", 0)
    share, case = found.largest / FLOAT16_LARGEST, f"{graph}, {found.layer}"
    fault = f"{case} reaches {found.largest:.0f}, float16 ends at {FLOAT16_LARGEST:.0f}" if share >= 1 else ""
    remedies = (f"pixtral export CHECKPOINT -o {bundle.path} --force --dtype float32",) if fault else ()
    return StageCheck("headroom", len(known.headroom), share, 1.0, fault, remedies, case)


def _broken(stage: str, error: PixtralError) -> StageCheck:
    return StageCheck(stage, 1, 1, 0, str(error), error.remedies)
