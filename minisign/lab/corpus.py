"""Text in two invented languages with skewed word frequencies, the same for the same seed everywhere.

A common language makes up most of the documents, a rare one (other letters, other words, other word
order) a fixed share. Words follow Zipf's law: within a word class the word of rank k is drawn with a
probability in proportion to 1/kˢ. There is enough grammar for a model to learn: nouns have a gender
that articles and adjectives agree with, subject and verb agree in number, a third of the verbs govern
a preposition, and a document keeps to a topic, which moves half of the draws to a rank at most eleven
further.

The randomness comes from ``numpy.random.RandomState``, whose stream numpy has frozen, and all weights
are whole numbers, so that no platform's rounding shows. The hashes in ``data/`` are tested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

GENDERS = 3
TOPICS = 12
LARGEST = 100_000_000  # words: what takes minutes and a gigabyte; more is taken for a mistake


@dataclass(frozen=True)
class CorpusConfig:
    """What :func:`generate` writes.

    Args:
        words: about how many words, up to 100 million; the text ends with the document that reaches them.
        exponent: s of Zipf's law; 0 makes all words of a class equally frequent.
        rare_share: share of the documents in the rare language, in [0, 1].
        seed: of everything random.
        lexicon: times as many words in each class as :class:`Language` says, for large vocabularies.
    """

    words: int = 800_000
    exponent: float = 1.3
    rare_share: float = 0.01
    seed: int = 0
    lexicon: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.words, bool) or not isinstance(self.words, int):
            raise TypeError(f"words must be a whole number, got {self.words!r}")
        if not 1 <= self.words <= LARGEST:
            raise ValueError(f"words must be 1 to {LARGEST:,}, got {self.words}")
        if not 0 <= self.exponent <= 4:
            raise ValueError(f"exponent must be in [0, 4], got {self.exponent}")
        if not 0 <= self.rare_share <= 1:
            raise ValueError(f"rare_share must be in [0, 1], got {self.rare_share}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2³²), got {self.seed}")
        if isinstance(self.lexicon, bool) or not isinstance(self.lexicon, int):
            raise TypeError(f"lexicon must be a whole number, got {self.lexicon!r}")
        if not 1 <= self.lexicon <= 100:
            raise ValueError(f"lexicon must be 1 to 100, got {self.lexicon}")


DEFAULT = CorpusConfig()


@dataclass(frozen=True)
class Language:
    """Sounds and sizes of an invented language.

    Args:
        consonants, vowels: letters or letter groups that syllables are made of.
        verb_last: the verb stands at the end of its clause, else after the subject.
        nouns, verbs, adjectives, adverbs, prepositions: size of each word class.
    """

    consonants: tuple[str, ...]
    vowels: tuple[str, ...]
    verb_last: bool
    nouns: int
    verbs: int
    adjectives: int
    adverbs: int
    prepositions: int = 12

    def larger(self, times: int) -> Language:
        """The same with so many times as many nouns, verbs, adjectives and adverbs."""
        classes = ("nouns", "verbs", "adjectives", "adverbs")
        return replace(self, **{name: times * getattr(self, name) for name in classes})


COMMON = Language(
    consonants=tuple("b d f g k l m n p r s t v z br dr gr kl pl st tr".split()),
    vowels=tuple("aeiou"),
    verb_last=False,
    nouns=3600,
    verbs=1200,
    adjectives=900,
    adverbs=300,
)
RARE = Language(
    consonants=tuple("ch h j q w x y hw jh xh".split()),
    vowels=("ä", "ö", "ü", "å", "ie"),
    verb_last=True,
    nouns=900,
    verbs=300,
    adjectives=225,
    adverbs=75,
)


@lru_cache(maxsize=2)  # runs that are compared share their text, and a text its vocabulary comes from
def generate(config: CorpusConfig = DEFAULT) -> str:
    """The text: documents of about 90 words, a blank line between two, ending with a newline."""
    random = np.random.RandomState(config.seed)
    common, rare = (
        _Writer(language.larger(config.lexicon), config.exponent, random) for language in (COMMON, RARE)
    )
    documents, words = [], 0
    while words < config.words:
        is_rare = random.random_sample() < config.rare_share
        document, count = (rare if is_rare else common).document()
        documents.append(document)
        words += count
    return "\n\n".join(documents) + "\n"


def is_rare_language(text: str) -> bool:
    """Whether a document of :func:`generate` is in the rare language: told by its vowels."""
    return any(vowel in text for vowel in "äöüå")


def sha256(text: str) -> str:
    """Hash of the text as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def zipf_weights(n: int, exponent: float) -> np.ndarray:
    """Whole numbers [n] in proportion to 1/kˢ, k = 1 … n: 2²⁴ for the first, at least 1."""
    return np.array([max(1, round(2**24 * k**-exponent)) for k in range(1, n + 1)], dtype=np.int64)


class _Writer:
    """Writes documents of one language."""

    def __init__(self, language: Language, exponent: float, random: np.random.RandomState) -> None:
        self.language, self.random = language, random
        taken: set[str] = set()
        article = [self._word(1, taken) for _ in range(2 * GENDERS)]
        self.articles = [article[2 * i : 2 * i + 2] for i in range(GENDERS)]
        self.endings = language.vowels[:GENDERS]
        self.prepositions = self._lexicon(language.prepositions, taken)
        self.conjunctions = [self._word(1, taken) for _ in range(3)]
        self.adverbs = self._lexicon(language.adverbs, taken)
        self.nouns = self._lexicon(language.nouns, taken)
        self.verbs = self._lexicon(language.verbs, taken)
        self.adjectives = self._lexicon(language.adjectives, taken)
        self.noun = self._ranks(language.nouns, exponent)
        self.verb = self._ranks(language.verbs, exponent)
        self.adjective = self._ranks(language.adjectives, exponent)
        self.adverb = self._ranks(language.adverbs, exponent)
        self.uniform = self._uniform()

    def document(self) -> tuple[str, int]:
        self.topic = int(next(self.uniform) * TOPICS)
        words: list[str] = []
        sentences = []
        count = 0
        for _ in range(4 + int(next(self.uniform) * 9)):
            words = self._clause()
            if next(self.uniform) < 0.3:
                words.append(self.conjunctions[int(next(self.uniform) * 3)])
                words += self._clause()
            sentences.append(" ".join(words) + ".")
            count += len(words)
        return " ".join(sentences), count

    def _clause(self) -> list[str]:
        uniform = self.uniform
        plural = next(uniform) < 0.3
        subject = self._noun_phrase(plural)
        verb = self._on_topic(self.verb, self.language.verbs)
        form = self.verbs[verb] + self.language.consonants[plural]
        rest = [] if next(uniform) < 0.25 else self._noun_phrase(next(uniform) < 0.3)
        if rest and verb % 3 == 0:
            rest = [self.prepositions[verb // 3 % len(self.prepositions)], *rest]
        if next(uniform) < 0.25:
            rest.append(self.adverbs[next(self.adverb)])
        return [*subject, *rest, form] if self.language.verb_last else [*subject, form, *rest]

    def _noun_phrase(self, plural: bool) -> list[str]:
        noun = self._on_topic(self.noun, self.language.nouns)
        gender = noun % GENDERS
        words = [self.articles[gender][plural]]
        if next(self.uniform) < 0.35:
            adjective = self._on_topic(self.adjective, self.language.adjectives)
            words.append(self.adjectives[adjective] + self.endings[gender])
        words.append(self.nouns[noun])
        return words

    def _on_topic(self, ranks: Iterator[int], n: int) -> int:
        """A word of the class. Half of the draws keep to ranks that belong to the document's topic."""
        k = next(ranks)
        if next(self.uniform) < 0.5:
            k += (self.topic - k) % TOPICS
        return k if k < n else k - TOPICS

    def _ranks(self, n: int, exponent: float) -> Iterator[int]:
        """Endless ranks, from 0, with Zipf frequencies."""
        edges = np.cumsum(zipf_weights(n, exponent))
        while True:
            draws = np.floor(self.random.random_sample(8192) * edges[-1]).astype(np.int64)
            yield from np.searchsorted(edges, draws, side="right").tolist()

    def _uniform(self) -> Iterator[float]:
        while True:
            yield from self.random.random_sample(8192).tolist()

    def _lexicon(self, n: int, taken: set[str]) -> list[str]:
        """``n`` new words by falling frequency; frequent words are shorter."""
        return [self._word(2 + (k >= 40) + (k >= 1500), taken) for k in range(n)]

    def _word(self, syllables: int, taken: set[str]) -> str:
        c, v = self.language.consonants, self.language.vowels
        while True:
            parts = self.random.random_sample(2 * syllables)
            word = "".join(
                letters[int(x * len(letters))]
                for letters, x in zip([c, v] * syllables, parts.tolist(), strict=True)
            )
            if word not in taken:
                taken.add(word)
                return word
