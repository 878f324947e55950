"""Caption perturbations: text in, text out. Used at training on what a model is told, and at sampling on prompts.

A model that memorises does so by a key, and the caption is the key: one that never comes twice alike opens less
(Somepalli et al. 2023, "Understanding and Mitigating Copying in Diffusion Models", arXiv 2305.20086, sec. 5). One
signature, and a dict. Knows nothing of models; imports no torch.
"""

import gzip
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

Perturbation = Callable[[np.random.Generator, str], str]  # (rng, caption) → caption

MERGES = 49_152 - 256 - 2  # lines of the vocabulary file that CLIP uses (openai/CLIP, simple_tokenizer.py)
NUMBERS = 100_000


def random_tokens(rng: np.random.Generator, caption: str, count: int = 2) -> str:
    """RT: `count` random tokens of CLIP's vocabulary, each at a random place between words.

    Somepalli et al. 2023, sec. 5, "random token replacement & addition"; their code (somepago/DCR, datasets.py
    `randwordadd`, diff_inference.py `rand_word_add`) adds 2, and 4 in sd_mitigation.py.
    """
    tokens = list_tokens()
    return _insert(rng, caption, [tokens[i] for i in rng.integers(len(tokens), size=count)])


def repeat_words(rng: np.random.Generator, caption: str, count: int = 2) -> str:
    """CWR: `count` random words of the caption once more, each at a random place. An empty caption stays empty.

    Somepalli et al. 2023, sec. 5, "caption word repetition"; code: `wordrepeat`, `rand_word_repeat`.
    """
    words = caption.split()
    return _insert(rng, caption, [words[i] for i in rng.integers(len(words), size=count)]) if words else caption


def random_caption(rng: np.random.Generator, caption: str, count: int = 4) -> str:
    """RC: `count` random tokens instead of the caption, whatever it was.

    Somepalli et al. 2023, sec. 5, "random caption replacement"; code: `randrepl`, with 4 tokens.
    """
    tokens = list_tokens()
    return " ".join(tokens[i] for i in rng.integers(len(tokens), size=count))


def random_numbers(rng: np.random.Generator, caption: str, count: int = 2) -> str:
    """RNA: `count` random numbers below 100,000, each at a random place.

    Somepalli et al. 2023, sec. 5, "random numbers addition"; code: `rand_numb_add`, at sampling only.
    """
    return _insert(rng, caption, [str(number) for number in rng.integers(NUMBERS, size=count)])


PERTURBATIONS: dict[str, Perturbation] = {
    "random-tokens": random_tokens,
    "repeat-words": repeat_words,
    "random-caption": random_caption,
    "random-numbers": random_numbers,
}


def _insert(rng: np.random.Generator, caption: str, words: list[str]) -> str:
    """One word after the other, before, between or after those that are there."""
    sentence = caption.split()
    for word in words:
        sentence.insert(int(rng.integers(len(sentence) + 1)), word)
    return " ".join(sentence)


@lru_cache(maxsize=1)
def list_tokens() -> tuple[str, ...]:
    """Tokens of CLIP as text, in the order of its vocabulary: those that end a word, of printable ASCII.

    The others are pieces of words, or of characters: no text by themselves. Raises ModuleNotFoundError.
    """
    letters = [chr(code) for code in range(33, 127)]  # as bytes and as characters the same (GPT-2's table)
    words = ("".join(merge.split()) for merge in read_merges())
    whole = [word.removesuffix("</w>") for word in words if word.endswith("</w>")]
    return tuple(letters + [word for word in whole if word.isascii() and word.isprintable()])


def read_merges() -> list[str]:
    """The byte pairs of CLIP's tokenizer (Radford et al. 2021), most frequent first, "left right" a line.

    The vocabulary file comes with the package open-clip-torch. It is only read: that package is never imported.
    Raises ModuleNotFoundError.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("CLIP's vocabulary comes with open-clip-torch", name="open-clip-torch")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    return gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
