"""The training of the demo model: what it reads, in which order, and that it resumes exactly."""

from __future__ import annotations

import ast
import datetime as dt
import io
import itertools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from train_demo import batches, conversations, corpus
from train_demo.batches import Mix, Texts, TokenizedCorpus
from train_demo.completions import (
    call_prompts,
    closes_brackets,
    finishes_line,
    opens_block,
    parses,
)
from train_demo.corpus import SourceFile, Topic
from train_demo.keeper import RunKeeper
from train_demo.progress import ProgressDisplay
from train_demo.schedule import Budget, learning_rate_factor, next_time_of_day
from train_demo.tokenizer import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    USER,
    render,
    special_token_id,
    train_tokenizer,
)
from train_demo.training import (
    Recipe,
    Run,
    StepReport,
    evaluate,
    load_checkpoint,
    make_run,
    save_checkpoint,
    sequence_loss,
    train,
)
from train_demo.workers import Assignment, open_group
from transformers import PreTrainedTokenizerFast

TINY = Recipe(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    context=16,
    batch_size=2,
    num_warmup_steps=2,
    use_bfloat16=False,
)
MODULE = '''"""A module number {number}."""

import os


class Shelf{number}:
    """Holds things."""

    def put(self, thing):
        """Put a thing on the shelf. It stays there."""
        for place in range({number} + 10):
            if self.is_free(place):
                self.places[place] = thing
                break
        else:
            raise ValueError("the shelf is full")
        return place


def count_{number}(things, *, limit=None):
    """Return how many things there are.

    No more than limit are counted.
    """
    return min(len(things), limit or len(things))
'''


def _toy_files(num_files: int) -> list[SourceFile]:
    return [
        SourceFile(path=f"toys/module_{number}.py", text=MODULE.format(number=number))
        for number in range(num_files)
    ]


def _toy_topics(num_topics: int) -> list[Topic]:
    text = 'The "{0}" statement\n*******\n\nA page on {0}.\n\nMore.\n'
    return [Topic(name=f"topic{i}", text=text.format(f"topic{i}")) for i in range(num_topics)]


@pytest.fixture(scope="module")
def texts() -> Texts:
    """The training split of a library of toys."""
    return batches.select_texts(_toy_files(40), _toy_topics(40), held_out=False)


@pytest.fixture(scope="module")
def tokenizer(texts: Texts) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts.documents, vocab_size=TINY.vocab_size)


@pytest.fixture(scope="module")
def tokenized(tokenizer: PreTrainedTokenizerFast, texts: Texts) -> TokenizedCorpus:
    return batches.encode_texts(tokenizer, texts)


def _tiny_run(recipe: Recipe = TINY) -> Run:
    end_ids = [special_token_id(EOS), special_token_id(END)]
    bos, pad = special_token_id(BOS), special_token_id(PAD)
    return make_run(recipe, eos_token_ids=end_ids, bos_token_id=bos, pad_token_id=pad)


# ------------------------------------------------------------------------------------------------- the corpus


def test_split_each_file_falls_on_one_side() -> None:
    """Nothing that is measured with is ever trained on: files, topics and what is made of them."""
    files, topics = _toy_files(200), _toy_topics(200)
    train_split = batches.select_texts(files, topics, held_out=False)
    held_out = batches.select_texts(files, topics, held_out=True)
    assert held_out.documents
    assert len(train_split.documents) + len(held_out.documents) == len(files) + len(topics)
    for name in ("documents", "snippets", "conversations"):
        kept, measured = getattr(train_split, name), getattr(held_out, name)
        assert measured, name
        assert not set(_texts_of(kept)) & set(_texts_of(measured)), name


def _texts_of(items: tuple[object, ...]) -> list[str]:
    """Texts that name their file, so that equal phrases of two toys do not count as a leak."""
    return [str(item) for item in items if "_" in str(item) or "topic" in str(item)]


def test_split_same_key_same_side_on_every_machine() -> None:
    """The split is a fixed function of the name: these are its values for three library files."""
    sides = {name: corpus.is_held_out(name) for name in ("ast.py", "copy.py", "argparse.py")}
    assert sides == {"ast.py": True, "copy.py": True, "argparse.py": False}


def test_split_holds_out_about_one_in_32() -> None:
    """The hash spreads names evenly enough for the held-out share to be what it says."""
    num_held_out = sum(corpus.is_held_out(f"module_{i}.py") for i in range(32_000))
    assert 850 < num_held_out < 1150


def test_source_files_leave_out_tests_tables_and_what_is_installed(tmp_path: Path) -> None:
    """The model learns the library's programs: no tests, no code pages, no site-packages."""
    wanted = ("json/decoder.py", "os.py", "unittest/case.py")
    unwanted = (
        "test/test_os.py",
        "json/tests/test_x.py",
        "site-packages/numpy/core.py",
        "pydoc_data/topics.py",
        "idlelib/idle_test/test_run.py",
    )
    for name in (*wanted, *unwanted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import os\n")
    (tmp_path / "table.py").write_text("T = [" + "0x12345, " * 50 + "]\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("")
    assert tuple(file.path for file in corpus.read_source_files(tmp_path)) == wanted


def test_source_files_of_this_python_are_many_and_parse() -> None:
    """Every CPython install carries enough text to train on."""
    files = corpus.read_source_files(corpus.standard_library_root())
    assert sum(len(file.text) for file in files) > 4_000_000
    assert not any("test" in file.path.split("/")[:-1] for file in files)
    assert len(corpus.read_topics()) > 50


def test_definitions_are_whole_dedented_programs() -> None:
    """A method cut out of its class is a function that parses on its own, decorators included."""
    source = "class A:\n    @property\n    def size(self) -> int:\n        '''Its size.'''\n        return 1\n"
    found = {
        item.name: item for item in corpus.definitions_of(SourceFile(path="a.py", text=source))
    }
    assert found["size"].source.startswith("@property\ndef size(self) -> int:\n    ")
    assert found["size"].signature == "size(self)"
    assert found["size"].docstring == "Its size."
    assert found["A"].is_class
    for item in found.values():
        ast.parse(item.source)


# -------------------------------------------------------------------------------------- conversations, tokens


def test_conversations_end_with_the_assistant_and_ask_first(texts: Texts) -> None:
    """The model learns to answer and to stop: roles alternate, the last turn is its own."""
    assert {"system", "user", "assistant"} == {
        message.role for talk in texts.conversations for message in talk.messages
    }
    for talk in (*texts.conversations, *texts.greetings):
        roles = [message.role for message in talk.messages if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message.content.strip() for message in talk.messages)


def test_conversations_write_request_answers_with_the_source() -> None:
    """What is asked for and what is answered belong together."""
    file = _toy_files(1)[0]
    definition = next(item for item in corpus.definitions_of(file) if item.name == "count_0")
    talks = list(conversations.about_definitions([definition]))
    question, answer = [m for m in talks[0].messages if m.role != "system"][:2]
    assert "how many things there are" in question.content
    assert answer.content == f"```python\n{definition.source.rstrip()}\n```"


def test_completion_request_halves_make_the_whole() -> None:
    """`Complete:` hands over the rest of the very same function."""
    file = _toy_files(1)[0]
    definition = next(item for item in corpus.definitions_of(file) if item.name == "put")
    talk = next(
        talk
        for talk in conversations.about_definitions([definition])
        if any(message.content.startswith("Complete:") for message in talk.messages)
    )
    asked, given = talk.messages[-2].content, talk.messages[-1].content
    halves = [text.split("```python\n")[1].removesuffix("\n```") for text in (asked, given)]
    assert "\n".join(halves) == definition.source.rstrip()


def test_conversation_through_template_and_back_keeps_every_turn(
    tokenizer: PreTrainedTokenizerFast, texts: Texts
) -> None:
    """Rendering, encoding and decoding lose nothing, and the roles are single tokens."""
    for talk in (*texts.conversations[:20], *texts.greetings):
        rendered = render(tokenizer, talk.messages)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == rendered
        assert ids.count(special_token_id(END)) == len(talk.messages)
        assert ids[0] == special_token_id(BOS)


def test_generation_prompt_is_a_prefix_of_what_was_trained(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A server renders the question exactly as training did, up to the assistant's first word."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{BOS}{USER}Hi{END}{ASSISTANT}"
    assert whole == f"{prompt}Hello!{END}"


def test_chat_template_unknown_role_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """A role that the model never saw is an error, not a silent word of text."""
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@given(text=st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_tokenizer_any_text_comes_back_whole(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Byte-level: no text is lost or changed, trained on or not."""
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer.decode(ids) == text


def test_tokenizer_special_ids_and_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Special tokens stand first in the given order, a prompt begins with BOS, digits are single."""
    assert [tokenizer.backend_tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(
        range(len(SPECIAL_TOKENS))
    )
    ids = tokenizer("1234")["input_ids"]
    assert ids[0] == special_token_id(BOS)
    assert len(ids) == 5


# ------------------------------------------------------------------------------------------- order of reading


def test_documents_begin_with_bos_and_end_with_eos(tokenized: TokenizedCorpus) -> None:
    """Every kind of document teaches the model to stop."""
    for kind in (tokenized.documents, tokenized.snippets, tokenized.conversations):
        assert kind
        for ids in kind:
            assert (ids[0], ids[-1]) == (special_token_id(BOS), special_token_id(EOS))
    assert all(ids[-2] == special_token_id(END) for ids in tokenized.conversations)


def test_cut_windows_predict_every_token_once() -> None:
    """Targets of the windows, laid end to end, are the text without its first token."""
    documents = [np.arange(0, 37, dtype=np.uint16), np.arange(37, 100, dtype=np.uint16)]
    windows = batches.cut_windows(documents, context=9)
    assert windows.shape == (11, 10)
    assert windows[:, 1:].ravel().tolist() == list(range(1, 100))


def test_epoch_same_seed_same_order_other_epoch_other_order(tokenized: TokenizedCorpus) -> None:
    """What a run reads is a function of its seed and the epoch's number."""

    def windows(seed: int, epoch: int) -> np.ndarray:
        return batches.epoch_windows(tokenized, Mix(), context=16, seed=seed, epoch=epoch)

    assert np.array_equal(windows(0, 0), windows(0, 0))
    assert not np.array_equal(windows(0, 0)[:20], windows(0, 1)[:20])
    assert not np.array_equal(windows(0, 0)[:20], windows(1, 0)[:20])


def test_epoch_holds_every_document_and_the_share_of_conversations(
    tokenized: TokenizedCorpus,
) -> None:
    """All files once, and as many conversation tokens as the mix asks for."""
    mix = Mix(snippet_share=0.1, conversation_share=0.12)
    windows = batches.epoch_windows(tokenized, mix, context=16, seed=0, epoch=0)
    targets = windows[:, 1:].ravel()
    num_endings = int((targets == special_token_id(EOS)).sum())
    assert num_endings > len(tokenized.documents)
    wanted = tokenized.num_document_tokens / 0.78
    greetings = batches.NUM_GREETING_REPEATS * sum(map(len, tokenized.greetings))
    assert targets.size == pytest.approx(wanted + greetings, rel=0.06)


def test_batches_started_late_continue_the_same_sequence(tokenized: TokenizedCorpus) -> None:
    """Resuming at step n reads what step n would have read, across the end of an epoch too."""

    def first_batches(first_step: int, count: int) -> list[np.ndarray]:
        source = batches.iterate_batches(
            tokenized, Mix(), context=16, batch_size=50, seed=3, first_step=first_step
        )
        return list(itertools.islice(source, count))

    per_epoch = len(batches.epoch_windows(tokenized, Mix(), context=16, seed=3, epoch=0)) // 50
    late = first_batches(per_epoch - 1, 3)
    assert all(map(np.array_equal, first_batches(0, per_epoch + 2)[-3:], late))


# ----------------------------------------------------------------------------------------------- the schedule


@given(
    moments=st.lists(
        st.tuples(st.integers(0, 10_000), st.floats(0, 50_000)), min_size=2, max_size=30
    ),
    num_tokens=st.none() | st.integers(1, 200_000),
    deadline=st.none() | st.floats(1, 60_000),
    start_progress=st.floats(0, 1),
)
def test_progress_never_falls_and_stays_within_one(
    moments: list[tuple[int, float]],
    num_tokens: int | None,
    deadline: float | None,
    start_progress: float,
) -> None:
    """However the machine's speed varies, a run only goes forward, and past its start."""
    budget = Budget(num_tokens=num_tokens, deadline_s=deadline, start_progress=start_progress)
    ordered = zip(sorted(m[0] for m in moments), sorted(m[1] for m in moments), strict=True)
    line = [budget.progress(tokens, now) for tokens, now in ordered]
    assert line == sorted(line)
    assert all(start_progress <= point <= 1.0 for point in line)


def test_progress_reaches_one_at_the_deadline_whatever_was_trained() -> None:
    """A paused process still decays to zero in time."""
    budget = Budget(num_tokens=10**9, start_s=100.0, deadline_s=200.0, start_progress=0.4)
    assert budget.progress(0, 100.0) == pytest.approx(0.4)
    assert budget.progress(0, 150.0) == pytest.approx(0.7)
    assert budget.progress(0, 200.0) == 1.0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_learning_rate_rises_then_never_rises_again(points: list[float]) -> None:
    """Warm-up up, then level, then down to exactly zero at the end."""
    line = [
        learning_rate_factor(step=100 + i, progress=p, num_warmup_steps=50, decay_fraction=0.5)
        for i, p in enumerate(sorted(points))
    ]
    assert line == sorted(line, reverse=True)
    warm_up = [
        learning_rate_factor(step=s, progress=0.0, num_warmup_steps=50, decay_fraction=0.5)
        for s in range(60)
    ]
    assert warm_up == sorted(warm_up)
    assert warm_up[-1] == 1.0
    assert learning_rate_factor(step=9, progress=1.0, num_warmup_steps=1, decay_fraction=0.5) == 0.0


@pytest.mark.parametrize(("text", "day"), [("20:25", 22), ("07:00", 23), ("18:45", 23)])
def test_time_of_day_is_the_next_one(text: str, day: int) -> None:
    """`--until` before now means tomorrow."""
    now = dt.datetime(2024, 11, 22, 18, 45, 0, tzinfo=dt.UTC)
    moment = next_time_of_day(text, now)
    assert (moment.day, f"{moment:%H:%M}") == (day, text)


# ---------------------------------------------------------------------------------------------------- the run


def test_training_resumed_from_checkpoint_is_bit_exact(
    tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    """Three steps, a stop, a new process and three more are the same as six at once."""
    budget = Budget(num_tokens=6 * TINY.batch_size * TINY.context)
    straight = _tiny_run()
    losses = [report.loss for report in train(straight, tokenized, Mix(), budget)]
    first = _tiny_run()
    resumed_losses = [
        report.loss for report in itertools.islice(train(first, tokenized, Mix(), budget), 3)
    ]
    save_checkpoint(first, tmp_path / "checkpoint.pt", {"note": "kept"})
    second = _tiny_run(TINY)
    assert load_checkpoint(second, tmp_path / "checkpoint.pt") == {"note": "kept"}
    resumed_losses += [report.loss for report in train(second, tokenized, Mix(), budget)]
    assert len(losses) == 6
    assert resumed_losses == losses
    assert (second.step, second.num_tokens) == (straight.step, straight.num_tokens)
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


@pytest.mark.slow
def test_training_by_two_workers_is_the_same_run(
    tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    """Workers share a batch and average its gradients: each step's loss is that of one worker."""
    budget = Budget(num_tokens=4 * TINY.batch_size * TINY.context)
    alone, shared = _tiny_run(), _tiny_run()
    losses = [report.loss for report in train(alone, tokenized, Mix(), budget)]
    assignment = Assignment(
        corpus=tokenized,
        mix=Mix(),
        recipe=TINY,
        checkpoint=None,
        rendezvous=tmp_path / "rendezvous",
        num_workers=2,
    )
    with open_group(assignment) as group:
        reports = list(train(shared, tokenized, Mix(), budget, group=group))
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-4)
    assert shared.step == alone.step == 4


def test_training_asked_to_stop_keeps_its_progress(tokenized: TokenizedCorpus) -> None:
    """A signal ends the run between two steps and does not look like the end of the budget."""
    run = _tiny_run()
    budget = Budget(num_tokens=10 * run.tokens_per_step)
    reports = list(train(run, tokenized, Mix(), budget, should_stop=lambda: run.step == 4))
    assert len(reports) == run.step == 4
    assert run.progress == pytest.approx(0.3)


def test_training_learns_the_toy_corpus(tokenized: TokenizedCorpus) -> None:
    """Forty steps bring the loss well below that of guessing by a uniform distribution."""
    run = _tiny_run()
    windows = batches.cut_windows(tokenized.documents[:4], context=TINY.context)
    before = evaluate(run.model, windows, batch_size=8, use_bfloat16=False)
    budget = Budget(num_tokens=40 * run.tokens_per_step)
    num_steps = sum(1 for _ in train(run, tokenized, Mix(), budget))
    after = evaluate(run.model, windows, batch_size=8, use_bfloat16=False)
    assert num_steps == 40
    assert before == pytest.approx(np.log(TINY.vocab_size), rel=0.05)
    assert after < before - 1.0


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """Resuming with other numbers says so instead of mixing two runs."""
    run = _tiny_run()
    save_checkpoint(run, tmp_path / "checkpoint.pt", {})
    other = _tiny_run(Recipe(**{**_fields(TINY), "seed": 1}))
    with pytest.raises(ValueError, match="holds a run of"):
        load_checkpoint(other, tmp_path / "checkpoint.pt")


def _fields(recipe: Recipe) -> dict[str, object]:
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}


def test_evaluate_is_the_mean_over_all_windows(tokenized: TokenizedCorpus) -> None:
    """A last batch of another size weighs by its windows."""
    run = _tiny_run()
    windows = batches.cut_windows(tokenized.documents[:2], context=TINY.context)[:5]
    with torch.no_grad():
        one_by_one = [
            sequence_loss(run.model, torch.from_numpy(row[None]), use_bfloat16=False).item()
            for row in windows
        ]
    mean = evaluate(run.model, windows, batch_size=2, use_bfloat16=False)
    assert mean == pytest.approx(np.mean(one_by_one), rel=1e-5)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_display_passes_every_report_on(is_terminal: bool) -> None:
    """A bar on a terminal, lines in a log, and the run itself sees no difference."""
    reports = [
        StepReport(step=n, num_tokens=n * 32, progress=n / 50, loss=4.0, learning_rate_factor=1.0)
        for n in range(1, 51)
    ]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=120)
    assert list(ProgressDisplay(console).follow(reports)) == reports
    shown = screen.getvalue()
    assert "step 50" in shown
    assert "loss 4.000" in shown
    assert ("\x1b[" in shown) == is_terminal
    assert is_terminal or shown.count("\n") == 2


def test_keeper_finish_measures_saves_and_says_how_to_go_on(
    tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    """A run that was stopped leaves a checkpoint, a measurement and the way to continue."""
    run, screen = _tiny_run(), io.StringIO()
    keeper = RunKeeper(
        run=run,
        windows=batches.cut_windows(tokenized.documents[:2], context=TINY.context),
        checkpoint=tmp_path / "checkpoint.pt",
        facts={"held_out_history": []},
        display=ProgressDisplay(Console(file=screen, width=120)),
    )
    keeper.finish()
    assert "--resume" in screen.getvalue()
    saved = load_checkpoint(_tiny_run(), keeper.checkpoint)
    ((num_tokens, loss),) = saved["held_out_history"]
    assert num_tokens == 0
    assert loss == pytest.approx(np.log(TINY.vocab_size), rel=0.05)


# -------------------------------------------------------------------------------------------- what is measured


def test_completion_measures_tell_good_from_bad() -> None:
    """The measures of the shipped model accept Python and refuse what is not."""
    block = "def f(x):\n"
    assert opens_block(block, "    return x\n")
    assert opens_block(block, '    """Return."""\n\n    return x\n')
    assert not opens_block(block, "return x\n")
    assert not opens_block(block, "")
    assert closes_brackets("f(g(", "x), [1])\n")
    assert not closes_brackets("f(g(", "x]\n")
    assert not closes_brackets("f(g(", "x, y")
    assert closes_brackets('f(")", ', '"(")')
    assert finishes_line("y = 1\n    x = f(", "a, [1])\n    y")
    assert finishes_line("    x = f(", "a,\n  b)\n")
    assert finishes_line("    if f(", "a):\n")
    assert not finishes_line("    x = f(", "a, b")
    assert not finishes_line("    x = f(", "a b)\n")
    assert not finishes_line("    x = f(", "a):\n")
    assert parses(block, "    return x\n    if")
    assert not parses(block, "    return return\n    x y\n")
    assert not parses(block, "    return x")


def test_call_prompts_end_at_a_first_call_and_spread_over_the_text() -> None:
    """A prompt is real source up to a bracket, whatever stands behind it in the file."""
    lines = [f"    value_{n} = make(thing, {n})" for n in range(100)]
    prompts = call_prompts(["\n".join(lines), '    """Prose of a docstring (here)."""'], limit=8)
    assert len(prompts) == 8
    assert all(prompt.endswith("make(") and prompt.count("\n") == 20 for prompt in prompts)
    assert prompts[0] != prompts[-1]
