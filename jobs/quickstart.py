"""`distill quickstart`: a teacher from nothing, then a student taught by it, on text that every machine has.

Trains a BPE tokenizer and a small Qwen3 teacher on the Python standard library's own sources, then runs the recipe
`quickstart.yaml` through the same path as any run: Ray Data scores, Ray Train trains two workers, MLflow remembers.
"""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from orchestrator import run as runs
from orchestrator.display import Display

RECIPES = Path(__file__).parent / "recipes"
VOCABULARY = 4096
HELD_OUT_ONE_IN = 20
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data", "ensurepip"}
END = "<|endoftext|>"

TEACHER = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64}
STUDENT = {"hidden_size": 88, "num_hidden_layers": 3, "intermediate_size": 264, "num_attention_heads": 4, "head_dim": 22}


def run_quickstart(folder: Path, verbose: bool) -> None:
    """Makes what is missing in `folder`, trains teacher and student, and shows the comparison."""
    display = Display(verbose)
    display.say(f"Text: the standard library's sources, in {folder / 'data'}")
    prepare(folder)
    teacher = train_teacher(folder, display)
    display.say("Student: the teacher's distributions and the text, against the text alone")
    overrides = [*places(folder), f"student={folder}/shapes/student", f"endpoints.teacher.model={teacher}"]
    overrides += ["endpoints.teacher.dtype=bfloat16"] if has_bfloat16() else []
    display.result(runs.distill(RECIPES / "quickstart.yaml", overrides, cluster(folder), display=display))


def train_teacher(folder: Path, display: Display, more: Sequence[str] = ()) -> Path:
    """Trains the teacher by its recipe and overrides unless it is there; where it is."""
    teacher = folder / "teacher"
    if not (teacher / "config.json").exists():
        display.say("Teacher: cross-entropy on that text")
        fast = ["train.precision=bfloat16"] if has_bfloat16() else []
        overrides = [*places(folder), f"student={folder}/shapes/teacher", *fast, *more]
        made = runs.distill(RECIPES / "quickstart_teacher.yaml", overrides, cluster(folder), display=display)
        Path(made.student).rename(teacher)
    return teacher


def places(folder: Path) -> list[str]:
    """Where the text lies."""
    return [f"data.train={folder}/data/train.jsonl", f"data.held_out={folder}/data/held_out.jsonl"]


def cluster(folder: Path) -> dict[str, object]:
    """Runs of the quickstart lie in its folder."""
    return {"storage": str(folder / "runs"), "mlflow": {"experiment": "quickstart"}}


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 natively; there it is two to four times as fast, elsewhere much slower."""
    return bool(torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False))


def prepare(folder: Path) -> None:
    """Text, tokenizer, the two shapes, and that of a student of bytes for recipes across tokenizers; each unless it is there."""
    if not (folder / "shapes").exists():
        _make(folder)
    if not (folder / "shapes" / "bytes").exists():
        tokenizer = byte_tokenizer()
        write_shape(folder / "shapes" / "bytes", tokenizer, STUDENT, len(tokenizer))


def _make(folder: Path) -> None:
    texts = dict(sources())
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split in ("train", "held_out"):
        rows = [{"text": text} for name, text in texts.items() if held_out(name) == (split == "held_out")]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    tokenizer = train_tokenizer(text for name, text in texts.items() if not held_out(name))
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        write_shape(folder / "shapes" / name, tokenizer, shape)


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of every module of the standard library, tests left out, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED.intersection(name.parts):
            yield str(name), path.read_text(encoding="utf-8", errors="replace")


def held_out(name: str) -> bool:
    """Whether a module belongs to the held-out split; the same on every machine."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def train_tokenizer(texts: Iterator[str], vocabulary: int = VOCABULARY, single_digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens; with `single_digits`, none of them holds two digits or a digit and
    something else."""
    tokenizer = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_alone]) if single_digits else bytes_alone
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def write_shape(folder: Path, tokenizer: PreTrainedTokenizerFast, shape: dict[str, int], vocabulary: int = VOCABULARY) -> None:
    """A configuration without weights, with the tokenizer beside it."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=vocabulary,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=shape["hidden_size"] ** -0.5,  # the usual 0.02 suits widths of thousands; here it costs half a nat
        **shape,
        **ends,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
