"""Train the demo checkpoint: a real Pixtral of 2 million parameters that answers easy-VQA's questions.

Same architecture as Pixtral-12B in small, with a truncated tekken vocabulary. Data: the train split of the easy-VQA
benchmark (PyPI `easy-vqa`, MIT). Pictures are put on canvases of varying size and aspect, described in a sentence,
questioned, and shown in pairs. Several questions share one encoded image: each question is a segment that sees the
image and itself only, at the positions it would have alone, so that one pass trains them all as single-turn requests.

The curriculum starts with the vision tower alone, under a linear probe that names shape and colour: the decoder costs
ten times as much a step and learns nothing about shapes (0.83, an answer from colours only) until the features show
them. Then the whole model learns questions and captions that name the shape's place. It finds the row of a third in
87 % of unseen pictures but the column in 64 % only, so a short last stage ends on captions without a place.

    python scripts/train_tiny.py --out artifacts/tiny          # about an hour and a half on 2 cores
    python scripts/train_tiny.py --out artifacts/tiny --resume # after an interruption

Writes consolidated.safetensors (bfloat16), params.json and tekken.json; the last line of output is JSON with the
accuracy on the official test split, teacher-forced in torch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import easy_vqa
import numpy as np
import torch
import torch.nn.functional as F
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from make_synthetic_checkpoint import params_json, write_tokenizer
from pixtral_export.checkpoint.tensor_names import halves_to_pairs
from pixtral_export.model.parameters import parameters
from pixtral_export.model.pixtral import Pixtral
from pixtral_runtime.bundle.config import DecoderConfig, ImageTokens, ModelConfig, VisionConfig

CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        intermediate_size=256, patch_size=8, image_size=256, rope_theta=1e4,
    ),
    decoder=DecoderConfig(
        dim=256, n_layers=3, head_dim=32, hidden_dim=384, n_heads=4, n_kv_heads=2, vocab_size=768,
        rope_theta=1e4, max_position=4096,
    ),
)  # fmt: skip
SPECIAL_TOKENS = 32  # tekken has 1,000; only the first 20 have a meaning
PICTURE = 64  # side of an easy-VQA picture in pixels
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # specification section 2.1
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
BOS, EOS, INST, END_INST = 1, 2, 3, 4
IMAGE = ImageTokens()

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
DESCRIBE = (
    "Describe this image in one short sentence.",
    "Describe the image.",
    "What is in this image?",
    "Write a caption for this image.",
)
DESCRIBE_EACH = ("Describe each image in one short sentence.", "Describe the images.")
BATCH = 32
PROBE_BATCH = 64  # while the vision tower trains alone
VISION, WHOLE, POLISH = range(3)  # stages
POLISH_RATE = 0.2  # of the learning rate, in the last stage
PROBE_WEIGHT = 0.2  # of the probe's loss, once answers are trained
QUESTIONS = 10  # segments per image


@dataclass(frozen=True)
class Picture:
    """One easy-VQA picture and all that is known of it."""

    pixels: np.ndarray  # (64, 64, 3) uint8
    shape: str
    color: str
    box: tuple[int, int]  # centre (x, y) of the shape in pixels
    questions: tuple[tuple[str, str], ...]


def load_split(split: str) -> list[Picture]:
    """Read a split; what is shown is taken from the questions and answers, where from the pixels."""
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, index in zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True):
        asked.setdefault(index, []).append((question, answer))
    pictures = []
    for index, questions in sorted(asked.items()):
        pixels = np.asarray(Image.open(paths[index]).convert("RGB"))
        background = np.median(pixels.reshape(-1, 3), axis=0)
        rows, columns = np.nonzero(np.abs(pixels - background).sum(-1) > 40)
        centre = (int(columns.mean()), int(rows.mean())) if len(rows) else (32, 32)
        words = " ".join(
            f"{question} {answer}" if answer not in ("yes", "no") else "" for question, answer in questions
        )
        shape = next((s for s in SHAPES if s in words), "")
        color = next((c for c in COLORS if c in words), "")
        pictures.append(Picture(pixels, shape, color, centre, tuple(questions)))
    return pictures


def place(picture: Picture, width: int, height: int, rng: random.Random) -> tuple[np.ndarray, str]:
    """Put a picture somewhere on a canvas of its background colour. Returns pixels and where the shape is, in words."""
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.median(picture.pixels.reshape(-1, 3), axis=0)
    left, top = rng.randint(0, width - PICTURE), rng.randint(0, height - PICTURE)
    canvas[top : top + PICTURE, left : left + PICTURE] = picture.pixels
    column = ("left", "center", "right")[min(2, 3 * (left + picture.box[0]) // width)]
    row = ("top", "middle", "bottom")[min(2, 3 * (top + picture.box[1]) // height)]
    return canvas, f"{row} {column}"


def caption(picture: Picture, where: str | None) -> str:
    place = "on a light background" if where is None else f"at the {where}"
    return f"A {picture.color} {picture.shape} {place}."


def single_questions(picture: Picture, where: str | None, rng: random.Random) -> list[tuple[str, str]]:
    """The benchmark's questions, reworded now and then, and a description."""
    asked = list(rng.sample(picture.questions, min(len(picture.questions), QUESTIONS - 1)))
    if picture.shape and picture.color:
        # Hard cases, balanced: name the shape or the colour that is there as often as one that is not.
        shape, color = rng.choice([picture.shape, rng.choice(SHAPES)]), rng.choice([picture.color, rng.choice(COLORS)])
        for subject, there in ((shape, shape == picture.shape), (f"{color} shape", color == picture.color)):
            asked.append((f"is there a {subject} in the image?", "yes" if there else "no"))
            asked.append((f"does the image not contain a {subject}?", "no" if there else "yes"))
        asked.append(("what shape is in the image?", picture.shape))
        asked.append(("what color is the shape?", picture.color))
        rng.shuffle(asked)
        asked = [*asked[: QUESTIONS - 1], (rng.choice(DESCRIBE), caption(picture, where))]
    return [(q[0].upper() + q[1:] if rng.random() < 0.3 else q, a) for q, a in asked]


def pair_questions(
    a: Picture, b: Picture, where: tuple[str | None, str | None], rng: random.Random
) -> list[tuple[str, str]]:
    """Questions that need both images, or the right one of the two."""
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    asked = [
        ("what shape is in the first image?", a.shape),
        ("what shape is in the second image?", b.shape),
        ("what color is the shape in the first image?", a.color),
        ("what color is the shape in the second image?", b.color),
        (f"do both images contain a {shape}?", "yes" if a.shape == b.shape == shape else "no"),
        (f"does the second image contain a {color} shape?", "yes" if b.color == color else "no"),
        (rng.choice(DESCRIBE_EACH), f"1. {caption(a, where[0])}\n2. {caption(b, where[1])}"),
    ]
    if a.shape != b.shape:
        first = rng.random() < 0.5
        asked.append((f"which image contains a {(a if first else b).shape}?", "first" if first else "second"))
    if a.color != b.color:
        first = rng.random() < 0.5
        asked.append((f"which image contains a {(a if first else b).color} shape?", "first" if first else "second"))
    return [(q[0].upper() + q[1:] if rng.random() < 0.3 else q, a) for q, a in asked]


def image_block(width: int, height: int) -> list[int]:
    """Token ids of an image of a canvas' size (specification section 1.4)."""
    columns, rows = width // CONFIG.vision.patch_size, height // CONFIG.vision.patch_size
    block = ([IMAGE.image] * columns + [IMAGE.image_break]) * rows
    return [*block[:-1], IMAGE.image_end]


@dataclass(frozen=True)
class Batch:
    """Requests that share a prefix length. T = prefix + padded segments."""

    pixels: Tensor  # (images, 3, H, W)
    labels: Tensor  # (images, 2): index of shape and colour, -100 where unknown
    tokens: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    mask: Tensor  # (B, 1, T, T)
    targets: Tensor  # (B, T), -100 where no answer is predicted
    answers: Tensor  # (B, T), segment number where an answer is predicted, else -1


def to_tensor(pixels: list[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 each -> (images, 3, H, W), normalized."""
    return torch.from_numpy((np.stack(pixels).astype(np.float32) / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def labels_of(pictures: list[Picture]) -> Tensor:
    """(images, 2): index of shape and colour, -100 where the questions do not tell."""
    rows = [(SHAPES.index(p.shape) if p.shape else -100, COLORS.index(p.color) if p.color else -100) for p in pictures]
    return torch.tensor(rows)


def pack(
    pictures: list[Picture],
    pixels: list[np.ndarray],
    prefix: list[int],
    asked: list[list[tuple[str, str]]],
    tok: Tekkenizer,
) -> Batch:
    """Lay each request's questions side by side after the shared image prefix."""
    rows = []
    for questions in asked:
        row = [(token, position, -1, -100) for position, token in enumerate(prefix)]
        for number, (question, answer) in enumerate(questions):
            prompt = [*tok.encode(question, bos=False, eos=False), END_INST]
            reply = [*tok.encode(answer, bos=False, eos=False), EOS]
            labels = [-100] * (len(prompt) - 1) + reply + [-100]
            for offset, (token, label) in enumerate(zip(prompt + reply, labels, strict=True)):
                row.append((token, len(prefix) + offset, number, label))
        rows.append(row)
    longest = max(map(len, rows))
    table = torch.tensor([row + [(0, 0, -2, -100)] * (longest - len(row)) for row in rows])  # (B, T, 4)
    tokens, position_ids, segment, targets = table.unbind(-1)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == -1)
    mask = (same & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    answers = torch.where(targets >= 0, segment, -1)
    return Batch(to_tensor(pixels), labels_of(pictures), tokens, position_ids, mask, targets, answers)


def probe_batch(pictures: list[Picture], rng: random.Random) -> tuple[Tensor, Tensor]:
    """Pixels and labels for the vision tower alone."""
    chosen = rng.sample(pictures, PROBE_BATCH)
    width, height = (PICTURE + 8 * (rng.randint(0, 5) if rng.random() < 0.6 else 0) for _ in range(2))
    return to_tensor([place(p, width, height, rng)[0] for p in chosen]), labels_of(chosen)


def make_batch(
    pictures: list[Picture], tok: Tekkenizer, progress: float, rng: random.Random, *, name_places: bool
) -> Batch:
    """A training batch. `progress` in 0..1 drives the curriculum: bare pictures, then canvases, then pairs too."""

    def placed_on(picture: Picture) -> tuple[np.ndarray, str | None]:
        pixels, where = place(picture, width, height, rng)
        return pixels, where if name_places else None

    pairs = progress > 0.15 and rng.random() < 0.2
    chosen = rng.sample(pictures, 2 * BATCH)
    known = [p for p in chosen if p.shape and p.color]
    width = height = PICTURE
    if progress > 0.1 and rng.random() < 0.6:
        width, height = (PICTURE + 8 * rng.randint(0, 6 if pairs else 9) for _ in range(2))
    if not pairs:
        placed = [placed_on(p) for p in chosen[:BATCH]]
        asked = [single_questions(p, where, rng) for p, (_, where) in zip(chosen, placed, strict=False)]
        prefix = [BOS, INST, *image_block(width, height)]
        return pack(chosen[:BATCH], [pixels for pixels, _ in placed], prefix, asked, tok)
    half = min(BATCH // 2, len(known) // 2)
    placed = [placed_on(p) for p in known[: 2 * half]]
    asked = [pair_questions(known[i], known[i + half], (placed[i][1], placed[i + half][1]), rng) for i in range(half)]
    order = [index for i in range(half) for index in (i, i + half)]
    prefix = [BOS, INST, *image_block(width, height), *image_block(width, height)]
    return pack([known[i] for i in order], [placed[i][0] for i in order], prefix, asked, tok)


def probe_loss(probe: torch.nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of naming shape and colour from the mean feature; features (images, P, D), labels (images, 2)."""
    shape, color = probe(features.mean(1)).float().split([len(SHAPES), len(COLORS)], dim=-1)
    return F.cross_entropy(shape, labels[:, 0]) + F.cross_entropy(color, labels[:, 1])


def answer_logits(model: Pixtral, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (R, V) and targets (R,) at the positions that predict an answer's token; features (images·P, D)."""
    is_image = batch.tokens == IMAGE.image
    index = torch.where(is_image, is_image.flatten().cumsum(0).view_as(batch.tokens) - 1, -1)
    x = model.tok_embeddings(batch.tokens, features, index)
    x = model.hidden(x, batch.position_ids, batch.mask)
    rows = (batch.targets.flatten() >= 0).nonzero().squeeze(1)
    return model(x, rows), batch.targets.flatten()[rows]


@torch.no_grad()
def accuracy(model: Pixtral, pictures: list[Picture], tok: Tekkenizer) -> float:
    """Share of questions whose greedy answer is exact: every token of it is the arg-max after the right ones before."""
    right = total = 0
    for first in range(0, len(pictures), 64):
        part = pictures[first : first + 64]
        prefix = [BOS, INST, *image_block(PICTURE, PICTURE)]
        batch = pack(part, [p.pixels for p in part], prefix, [list(p.questions) for p in part], tok)
        logits, targets = answer_logits(model, batch, model.image_features(batch.pixels).flatten(0, 1))
        rows = (batch.targets >= 0).nonzero()
        keys = rows[:, 0] * 1000 + batch.answers[rows[:, 0], rows[:, 1]]
        wrong = set(keys[logits.argmax(-1) != targets].tolist())
        total += len(set(keys.tolist()))
        right += len(set(keys.tolist())) - len(wrong)
    return right / total


def new_model() -> Pixtral:
    model = Pixtral(CONFIG, positions=CONFIG.decoder.max_position)
    depth = math.sqrt(2 * max(CONFIG.vision.num_hidden_layers, CONFIG.decoder.n_layers))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif name == "tok_embeddings.weight":
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[0]
            residual = ".wo." in name or ".w2." in name
            torch.nn.init.normal_(parameter, std=fan_in**-0.5 / (depth if residual else 1.0))
    return model


def write_checkpoint(model: Pixtral, folder: Path) -> None:
    """Mistral format: weights (out, in), rotary rows as adjacent pairs, bfloat16."""
    state = dict(model.named_parameters())
    tensors = {}
    for parameter in parameters(CONFIG):
        tensor = state[parameter.name].detach()
        tensor = tensor.T if parameter.is_linear else tensor
        if parameter.rotary_heads:
            tensor = halves_to_pairs(tensor.contiguous(), parameter.rotary_heads)
        tensors[parameter.name] = tensor.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params_json(CONFIG), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("artifacts/tiny"))
    parser.add_argument("--vision-steps", type=int, default=700, help="steps of the vision tower alone, first")
    parser.add_argument("--steps", type=int, default=2800, help="steps of the whole model")
    parser.add_argument("--polish-steps", type=int, default=300, help="last steps, on captions without a place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = {"image_patch_size": CONFIG.vision.patch_size, "max_image_size": CONFIG.vision.image_size}
    vocabulary = CONFIG.decoder.vocab_size
    write_tokenizer(args.out / "tekken.json", vocabulary, special_tokens=SPECIAL_TOKENS, image=sizes)
    tok = Tekkenizer.from_file(args.out / "tekken.json")
    train, test = load_split("train"), load_split("test")

    torch.manual_seed(args.seed)
    model = new_model()
    probe = torch.nn.Linear(CONFIG.decoder.dim, len(SHAPES) + len(COLORS))
    trained = [*model.parameters(), *probe.parameters()]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    first, state_path = 0, args.out / "state.pt"
    if args.resume:
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        probe.load_state_dict(state["probe"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    started = time.monotonic()
    stages = (args.vision_steps, args.steps, args.polish_steps)
    total = sum(stages)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=total, completed=first)
        smooth = 0.0
        for step in range(first, total):
            stage = sum(step >= end for end in accumulate(stages[:-1]))
            done = (step - sum(stages[:stage])) / stages[stage]  # share of the stage
            peak = args.learning_rate * (POLISH_RATE if stage == POLISH else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (done * stages[stage] + 1) / 150, (1 - done) / 0.6)
            # A batch depends on the seed and its number alone, so a resumed run repeats an undisturbed one.
            rng = random.Random(args.seed * 1_000_003 + step)
            with torch.autocast("cpu", torch.bfloat16):
                if stage == VISION:
                    pixels, labels = probe_batch(train, rng)
                    loss = probe_loss(probe, model.image_features(pixels), labels)
                else:
                    progress_now = 1.0 if stage == POLISH else done
                    batch = make_batch(train, tok, progress_now, rng, name_places=stage != POLISH)
                    features = model.image_features(batch.pixels)
                    logits, targets = answer_logits(model, batch, features.flatten(0, 1))
                    loss = F.cross_entropy(logits, targets) + PROBE_WEIGHT * probe_loss(probe, features, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            smooth = loss.item() if step in (first, stages[0]) else 0.98 * smooth + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"loss {smooth:.3f}")
            if (step + 1) % 250 == 0 or step + 1 == total:
                saved = {
                    "model": model.state_dict(), "probe": probe.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                }  # fmt: skip
                torch.save(saved, state_path.with_suffix(".tmp"))
                state_path.with_suffix(".tmp").replace(state_path)
                model.eval()
                score = accuracy(model, test[:200], tok)
                model.train()
                elapsed = time.monotonic() - started
                progress.console.print(
                    f"step {step + 1}: loss {smooth:.4f}, test {score:.3f} (200 images), {elapsed:.0f} s"
                )
    model.eval()
    write_checkpoint(model, args.out)
    parameter_count = sum(p.numel() for p in model.parameters())
    print(json.dumps({
        "stages": stages, "seed": args.seed, "parameters": parameter_count,
        "train_s": round(time.monotonic() - started, 1),
        "easy_vqa_test_accuracy": round(accuracy(model, test, tok), 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
