"""Conversations as tokens: with a chat template and without one, cut to length, and what is refused, in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from folklora.backbones.conversation import ConversationTokenizer
from folklora.data.chat import from_columns
from folklora.data.columns import Columns
from folklora.errors import BackboneError, DataError

CHAT = (("user", "w1 w2"), ("assistant", "w3 w4"))
LONG = (
    ("system", "w9"),
    ("user", "w1 w2"),
    ("assistant", "w3"),
    ("user", "w5"),
    ("assistant", "w6 w7"),
)
CHATML = (
    "{% for message in messages %}{{ '<start> ' + message.role + ' ' + message.content + ' <end> \n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start> assistant ' }}{% endif %}"
)
ROLES = ("<start>", "<end>", "<eos>", "<bos>")


def chatty(lab: SimpleNamespace, template: str = CHATML, **roles: str) -> Any:
    tokenizer = lab.words(*ROLES, **{"eos_token": "<eos>", **roles})
    tokenizer.chat_template = template
    return tokenizer


def text(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids)).replace("\n", "|")


def with_start(tokenizer: Any) -> Any:
    """As Llama's: a text begins with a token of its own, and BERT's: it ends with one, too."""
    from tokenizers import processors

    pair = [("<bos>", tokenizer.convert_tokens_to_ids("<bos>")), ("<eos>", tokenizer.convert_tokens_to_ids("<eos>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=pair
    )
    return tokenizer


# -- with a chat template --------------------------------------------------------------------------------------------


def test_a_conversation_is_its_prompt_and_the_last_turn(lab: SimpleNamespace) -> None:
    tokenizer = chatty(lab)
    made = ConversationTokenizer(tokenizer)
    assert text(tokenizer, made.prompt(LONG)) == (
        "<start> system w9 <end> | <start> user w1 w2 <end> | <start> assistant w3 <end> | "
        "<start> user w5 <end> | <start> assistant"
    )
    # The line break that the template writes behind the end token is not learnt.
    assert text(tokenizer, made.response(LONG)) == "w6 w7 <end>"
    assert made.prompt(LONG[:-1]) == made.prompt(LONG)  # the response may be yet to come


def test_what_ends_a_response_is_the_templates_own_sign_first(lab: SimpleNamespace) -> None:
    tokenizer = chatty(lab)
    ends = ConversationTokenizer(tokenizer, end_tokens=(40,)).end_tokens
    assert text(tokenizer, list(ends[:2])) == "<end> <eos>"
    assert ends[2] == 40


def test_a_template_without_a_sign_gets_the_tokenizers_end(lab: SimpleNamespace) -> None:
    template = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' \n' }}{% endfor %}"
    tokenizer = chatty(lab, template)
    made = ConversationTokenizer(tokenizer)
    # It has no generation prompt: who answers is given all the same, and no part of the answer.
    assert text(tokenizer, made.prompt(CHAT)) == "user : w1 w2 | assistant :"
    assert made.prompt(CHAT[:1]) == made.prompt(CHAT)
    assert text(tokenizer, made.response(CHAT)) == "w3 w4 | <eos>"


def test_the_templates_own_start_is_not_doubled(lab: SimpleNamespace) -> None:
    tokenizer = with_start(chatty(lab, "{{ '<bos> ' }}" + CHATML))
    made = ConversationTokenizer(tokenizer)
    assert text(tokenizer, made.prompt(CHAT)) == "<bos> <start> user w1 w2 <end> | <start> assistant"
    assert text(tokenizer, made.response(CHAT)) == "w3 w4 <end>"


THINKING = (  # as Qwen3's
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}{% set thoughts = parts[0] if parts | length > 1 else '' %}"
    "{{ '<start> assistant <think> ' + thoughts.replace('<think>', '') + '</think> \n' + parts[-1] + ' <end> \n' }}"
    "{% else %}{{ '<start> ' + m.role + ' ' + m.content + ' <end> \n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start> assistant ' }}{% endif %}"
)


def test_an_empty_block_of_thoughts_is_given_and_thoughts_of_ones_own_are_learnt(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES, "<think>", "</think>", eos_token="<eos>")
    tokenizer.chat_template = THINKING
    made = ConversationTokenizer(tokenizer)
    assert text(tokenizer, made.prompt(CHAT)) == "<start> user w1 w2 <end> | <start> assistant <think> </think> |"
    assert made.prompt(CHAT[:1]) == made.prompt(CHAT)
    assert text(tokenizer, made.response(CHAT)) == "w3 w4 <end>"
    assert made.decode(made.response(CHAT)) == "w3 w4"  # what an answer is compared with
    own = (CHAT[0], ("assistant", "<think> w8 </think> w3"))
    assert text(tokenizer, made.prompt(own)) == "<start> user w1 w2 <end> | <start> assistant"
    assert text(tokenizer, made.response(own)) == "<think> w8 </think> | w3 <end>"


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("space", ["", " "])
def test_tokens_are_those_of_the_whole_conversation(lab: SimpleNamespace, scheme: str, space: str) -> None:
    """SentencePiece puts a space before whatever it is given: a response given alone would begin with another token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(10)]
    vocabulary = ["<unk>", "</s>", "[A]", "▁", *words, *(f"▁{word}" for word in words)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=scheme), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", additional_special_tokens=["[A]"]
    )
    answer = "{{ '" + space + "' + m.content + eos_token }}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '[A]' }}{% else %}" + answer + "{% endif %}"
        "{% endfor %}"
    )
    ours = ConversationTokenizer(tokenizer)
    messages = [{"role": role, "content": content} for role, content in CHAT]
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(wanted)
    assert ours.prompt(CHAT) + ours.response(CHAT) == list(wanted)


@pytest.mark.parametrize("lead", ["", "\n", "  ", "\n\n", "{# for all #}\n"])
def test_a_template_is_rendered_as_the_library_does(lab: SimpleNamespace, lead: str) -> None:
    tokenizer = chatty(lab, lead + CHATML)
    messages = [{"role": "user", "content": "w1 w2"}]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ConversationTokenizer(tokenizer)._rendered(CHAT[:1]) == wanted


def test_tomorrow_s_tokens_are_today_s(lab: SimpleNamespace) -> None:
    dated = "{{ strftime_now('%d %B %Y') + ' <start> ' }}" + CHATML
    guarded = "{% if strftime_now is defined %}" + dated + "{% endif %}"
    for template in (dated, guarded):
        tokenizer = chatty(lab, template)
        rendered = ConversationTokenizer(tokenizer)._rendered(CHAT, complete=True)
        assert rendered.startswith("26 Jul 2024 <start> <start> user w1 w2 <end>")


def test_a_template_that_rewrites_the_prompt_is_refused(lab: SimpleNamespace) -> None:
    tokenizer = chatty(lab, "{{ messages | length }} " + CHATML)
    with pytest.raises(BackboneError, match="give model.template") as caught:
        ConversationTokenizer(tokenizer).response(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Only\nuser and assistant roles') }}",
        "{% for %}",
        "{{ messages.nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_refuses_or_is_broken_is_one_line(lab: SimpleNamespace, template: str) -> None:
    task = lab.task_of(lab.stock("llama"), chatty(lab, template))
    with pytest.raises(DataError, match="chat template.* allowed: ") as caught:
        task.encode([LONG])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [5, {"tool_use": CHATML}])
def test_a_template_that_is_none_is_one_line(lab: SimpleNamespace, template: Any) -> None:
    with pytest.raises(BackboneError, match="chat template.* allowed: ") as caught:
        lab.task_of(lab.stock("llama"), chatty(lab, template))
    assert "\n" not in str(caught.value)


def test_a_template_reads_nothing_of_this_machine(lab: SimpleNamespace) -> None:
    tokenizer = chatty(lab, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="unsafe"):
        ConversationTokenizer(tokenizer).prompt(CHAT)


# -- without one -----------------------------------------------------------------------------------------------------


def test_a_plain_prompt_and_its_response(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES, eos_token="<eos>")
    made = ConversationTokenizer(tokenizer)
    assert text(tokenizer, made.prompt(CHAT)) == "w1 w2 |"
    assert text(tokenizer, made.response(CHAT)) == "w3 w4 <eos>"
    around = ConversationTokenizer(tokenizer, "user : {} \nassistant :")
    assert text(tokenizer, around.prompt(CHAT)) == "user : w1 w2 | assistant :"
    braces = ConversationTokenizer(tokenizer, "{0} {} {x}")  # only "{}" is a place
    assert text(tokenizer, braces.prompt(CHAT)) == "[UNK] w1 w2 [UNK]"


def test_a_texts_own_start_stands_before_the_prompt_and_its_end_nowhere(lab: SimpleNamespace) -> None:
    tokenizer = with_start(lab.words(*ROLES, eos_token="<eos>"))
    made = ConversationTokenizer(tokenizer)
    assert text(tokenizer, made.prompt(CHAT)) == "<bos> w1 w2 |"
    assert text(tokenizer, made.response(CHAT)) == "w3 w4 <eos>"


def test_the_recipes_template_goes_before_the_tokenizers(lab: SimpleNamespace) -> None:
    tokenizer = chatty(lab)
    made = ConversationTokenizer(tokenizer, "{} :")
    assert text(tokenizer, made.prompt(CHAT) + made.response(CHAT)) == "w1 w2 : w3 w4 <eos>"


def test_messages_need_a_chat_template(lab: SimpleNamespace) -> None:
    task = lab.task_of(lab.stock("llama"), lab.words(*ROLES, eos_token="<eos>"))
    roles = "system, user, assistant, user, assistant"
    with pytest.raises(DataError, match=f"example 2: .*{roles}.* chat template") as caught:
        task.encode([CHAT, LONG])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_takes_the_models(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES)
    assert tokenizer.eos_token_id is None
    assert tokenizer.pad_token_id is None
    task = lab.task_of(lab.stock("llama"), tokenizer)  # its configuration says that 2 ends a text
    assert task.end_tokens == (2,)
    (example,) = task.encode([CHAT])
    assert example.tokens[-1] == 2
    endless = lab.task_of(lab.stock("gpt2", eos_token_id=None, bos_token_id=None), tokenizer)
    assert endless.end_tokens == ()
    (example,) = endless.encode([CHAT])
    assert text(tokenizer, example.tokens[example.prompt :]) == "w3 w4"
    layout = endless.lay_out([[example], endless.encode([(*CHAT[:1], ("assistant", "w3"))])], "never")
    assert layout.batch.tokens.shape == (2, 5)  # padded with something, though nothing is meant for it
    with pytest.raises(DataError, match="example 1: its response has no tokens"):
        endless.encode([(("user", "w1"), ("assistant", ""))])


def test_an_empty_response_is_its_end(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES, eos_token="<eos>")
    (example,) = lab.task_of(lab.stock("llama"), tokenizer).encode([(("user", "w1"), ("assistant", ""))])
    assert text(tokenizer, example.tokens) == "w1 | <eos>"
    assert example.prompt == 2


@pytest.mark.parametrize(
    ("start", "roles", "first"),
    [(True, {"eos_token": "<eos>"}, "<bos>"), (False, {"eos_token": "<eos>"}, "<eos>"), (False, {}, "<start>")],
)
def test_something_always_stands_before_a_response(
    lab: SimpleNamespace, start: bool, roles: dict[str, str], first: str
) -> None:
    tokenizer = lab.words(*ROLES, **roles)
    tokenizer = with_start(tokenizer) if start else tokenizer
    task = lab.task_of(lab.stock("gpt2", eos_token_id=1, bos_token_id=None), tokenizer, template="{}")
    (example,) = task.encode([(("user", ""), ("assistant", "w3"))])
    assert example.prompt == 1
    assert text(tokenizer, example.tokens[:2]) == f"{first} w3"
    assert task.encode_prompt((("user", ""),)) == example.tokens[:1]


def test_what_is_said_ends_at_the_first_end(lab: SimpleNamespace) -> None:
    tokenizer = chatty(lab)
    task = lab.task_of(lab.stock("llama"), tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["\n", "w3", "<start>", "w4", "<end>", "w5"])
    assert task.decode(ids) == "w3 w4"
    assert task.decode(ids[:2]) == "w3"
    assert task.decode([]) == ""


# -- lengths ---------------------------------------------------------------------------------------------------------

QUESTION = " ".join(f"w{i}" for i in range(10))


@pytest.mark.parametrize(
    ("answer", "limit", "prompt", "response"),
    [
        ("w30", 13, "<bos> w0 w1 w2 w3 w4 w5 w6 w7 w8 w9", "w30 <eos>"),
        ("w30", 6, "<bos> w7 w8 w9", "w30 <eos>"),
        ("w30", 4, "<bos> w9", "w30 <eos>"),
        ("w30", 3, "w9", "w30 <eos>"),
        ("w30 w31", 3, "w9", "w30 w31"),
        ("w30 w31 w32 w33", 4, "w9", "w30 w31 w32"),
        ("w30 w31 w32 w33", 6, "w9", "w30 w31 w32 w33 <eos>"),
        ("w30 w31 w32 w33", 7, "<bos> w9", "w30 w31 w32 w33 <eos>"),
        ("w30 w31 w32 w33 w34 w35", 8, "<bos> w9", "w30 w31 w32 w33 w34 w35"),  # it would fit, but not the question
        ("w30 w31 w32 w33 w34 w35 w36 w37 w38", 8, "<bos> w9", "w30 w31 w32 w33 w34 w35"),
        ("w30", 2, "w9", "w30"),
    ],
)
def test_the_prompt_is_cut_on_the_left_to_a_quarter_and_then_the_response_on_the_right(
    lab: SimpleNamespace, answer: str, limit: int, prompt: str, response: str
) -> None:
    tokenizer = with_start(lab.words(*ROLES, eos_token="<eos>"))
    task = lab.task_of(lab.stock("llama"), tokenizer, template="{}", max_length=limit)
    (example,) = task.encode([(("user", QUESTION), ("assistant", answer))])
    assert text(tokenizer, example.tokens[: example.prompt]) == prompt
    assert text(tokenizer, example.tokens[example.prompt :]) == response
    assert len(example) <= limit
    assert task.lay_out([[example]]).wanted.tolist() == example.tokens[example.prompt :]


def test_of_a_long_context_a_part_goes_and_never_what_is_asked(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES, eos_token="<eos>")
    task = lab.task_of(lab.stock("llama"), tokenizer, template="{}", max_length=8)
    row = {"asked": ["w30 w31"], "said": ["w40"], "about": [" ".join(f"w{i}" for i in range(20))]}
    chat = from_columns(Columns("table", ["row 1"], row, Path()), 0, "asked", "said", "about")
    (example,) = task.encode([chat])
    assert text(tokenizer, example.tokens) == "w18 w19 | | w30 w31 w40 <eos>"


def test_no_text_is_longer_than_the_model_has_positions(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES, eos_token="<eos>")
    task = lab.task_of(lab.stock("gpt2"), tokenizer, max_length=4096)
    assert task.max_length == 64
    long = " ".join(["w5"] * 200)
    assert len(task.encode([(("user", long), ("assistant", "w3"))])[0]) == 64
    assert len(task.encode([(("user", "w3"), ("assistant", long))])[0]) == 64


def test_how_many_are_cut_is_said_once(lab: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    task = lab.task_of(lab.stock("llama"), lab.words(*ROLES, eos_token="<eos>"), max_length=6)
    answers = ["w1", "w1 w2 w3 w4 w5 w6 w7"]
    chats = [(("user", question), ("assistant", answer)) for question in ("w1", QUESTION) for answer in answers]
    with caplog.at_level(logging.INFO, "folklora"):
        task.encode(chats)
        task.encode(chats[:1])
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 4 examples are longer than 6 tokens: 3 prompts cut on the left, 2 responses on the right"
    ]


def test_a_prompt_leaves_room_for_what_is_generated(lab: SimpleNamespace) -> None:
    tokenizer = with_start(lab.words(*ROLES, eos_token="<eos>"))
    task = lab.task_of(lab.stock("gpt2"), tokenizer, template="{}", max_length=64)
    chat = (("user", " ".join([QUESTION] * 10)), ("assistant", "w1"))
    assert len(task.encode_prompt(chat)) == 63
    assert task.encode_prompt(chat) == task.encode_prompt(chat[:1])
    short = task.encode_prompt(chat, room=60)
    assert text(tokenizer, short) == "<bos> w7 w8 w9"
    assert len(task.encode_prompt(chat, room=100)) == 1
    assert text(tokenizer, task.encode_prompt(CHAT)) == "<bos> w1 w2"


def test_words_that_the_model_has_not_are_refused(lab: SimpleNamespace) -> None:
    tokenizer = lab.words(*ROLES, *(f"x{i}" for i in range(40)))
    with pytest.raises(BackboneError, match="the tokenizer has tokens up to"):
        lab.task_of(lab.stock("llama"), tokenizer)
