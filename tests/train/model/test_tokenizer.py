"""The tokenizer of a recipe: its tokens, its template, and what it pads with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.chat_templates import TEMPLATES, find_template
from fusewright.train.data.chat.encoder import ChatEncoder
from fusewright.train.data.chat.template import Chat
from fusewright.train.model.tokenizer import load_tokenizer
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.recipe import Recipe

from ..conftest import CHATML, make_tokenizer
from ..data.templates import tokenizer_for


@pytest.fixture
def load(base: Path) -> Any:
    def loaded(**keys: Any) -> Any:
        keys = {"base_model": str(base), "datasets": [{"path": "x"}], **keys}
        return load_tokenizer(Recipe(**keys))

    return loaded


def test_as_it_is(load: Any) -> None:
    tokenizer = load()
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")


def test_tokens_are_added_and_replaced(load: Any) -> None:
    tokenizer = load(
        special_tokens={"eos_token": "<|eot|>", "additional_special_tokens": ["<|x|>"]},
        tokens=["<word>"],
    )
    for token in ("<|eot|>", "<|x|>", "<word>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.eos_token == "<|eot|>"
    assert tokenizer.decode(tokenizer("a<|x|><word>")["input_ids"], skip_special_tokens=True) == (
        "a<word>"
    )


def test_reserved_tokens_get_other_texts(load: Any) -> None:
    tokenizer = load(added_tokens_overrides={1: "<|begin|>"})
    assert tokenizer("<|begin|>")["input_ids"] == [1]
    assert len(tokenizer("<|im_start|>")["input_ids"]) > 1
    with pytest.raises(RecipeError, match="9999 is not an added token of the tokenizer"):
        load(added_tokens_overrides={9999: "a"})


def test_padding_is_never_a_new_token_nor_the_end_if_there_is_another(tmp_path: Path) -> None:
    recipe = Recipe(base_model="x", datasets=[{"path": "x"}], tokenizer_config=str(tmp_path))
    for name, padded in (("<pad>", "<pad>"), ("<other>", "<|im_end|>")):
        tokenizer = tokenizer_for(CHATML, "", None, "<|im_end|>")
        tokenizer.add_tokens([name], special_tokens=True)
        tokenizer.save_pretrained(tmp_path)
        size = len(tokenizer)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        loaded = load_tokenizer(recipe)
        assert loaded.pad_token == padded
        assert len(loaded) == size


def test_templates_by_name(load: Any, tmp_path: Path) -> None:
    assert load(chat_template="llama3").chat_template == TEMPLATES["llama3"]
    assert load(chat_template="tokenizer_default").chat_template == CHATML
    assert load(chat_template="tokenizer_default_fallback_llama3").chat_template == CHATML
    bare = make_tokenizer(None)
    assert find_template("tokenizer_default_fallback_gemma", None, bare) == TEMPLATES["gemma"]
    assert find_template(None, None, bare) is None
    (tmp_path / "my.jinja").write_text("{{ messages }}")
    for jinja in ("{{ messages }}", str(tmp_path / "my.jinja")):
        assert load(chat_template_jinja=jinja).chat_template == "{{ messages }}"
        assert find_template("jinja", jinja, bare) == "{{ messages }}"
    with pytest.raises(RecipeError, match="jinja needs chat_template_jinja"):
        find_template("jinja", None, bare)
    with pytest.raises(RecipeError, match="no template 'chatlm' here; did you mean chatml"):
        find_template("chatlm", None, bare)
    with pytest.raises(RecipeError, match="cannot be read"):
        find_template(None, str(tmp_path / "none.jinja"), bare)


def test_a_name_whose_template_the_tokenizer_brings(load: Any) -> None:
    assert load(chat_template="qwen3").chat_template == CHATML
    with pytest.raises(RecipeError, match="gemma3: the tokenizer's own template is of another"):
        load(chat_template="gemma3")
    for name in ("qwen3", "tokenizer_default_fallback_qwen3"):
        with pytest.raises(RecipeError, match="qwen3 is what the tokenizers of these models bring"):
            find_template(name, None, make_tokenizer(None))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yo."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
    "<|im_start|>assistant\nYo.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nSo.<|im_end|>\n",
    "llama3": "[B]<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>",
    "mistral_v1": "[B] [INST] Be brief.\n\nHi? [/INST] Yo.[E] [INST] Why? [/INST] So.[E]",
    "mistral_v2v3": "[B][INST] Hi?[/INST] Yo.[E][INST] Be brief.\n\nWhy?[/INST] So.[E]",
    "mistral_v3_tekken": "[B][INST]Hi?[/INST]Yo.[E][INST]Be brief.\n\nWhy?[/INST]So.[E]",
    "phi_3": "[B]<|system|>\nBe brief.<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\nYo.<|end|>\n"
    "<|user|>\nWhy?<|end|>\n<|assistant|>\nSo.<|end|>\n",
    "alpaca": "[B]Be brief.\n\n### Instruction:\nHi?\n\n### Response:\nYo.[E]"
    "### Instruction:\nWhy?\n\n### Response:\nSo.[E]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_write(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    special = {"bos_token": "[B]", "eos_token": "[E]"}
    if name == "gemma":
        with pytest.raises(Exception, match="System role not supported"):
            tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        text = tokenizer.apply_chat_template(MESSAGES[1:], tokenize=False, **special)
        assert text == (
            "[B]<start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nYo.<end_of_turn>\n"
            "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"
        )
        return
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, **special) == WRITTEN[name]
    before = tokenizer.apply_chat_template(
        MESSAGES[:-1], tokenize=False, add_generation_prompt=True, **special
    )
    assert WRITTEN[name].startswith(before)
    (tokens,) = ChatEncoder(tokenizer).encode([Chat("x", MESSAGES)])
    answers = [tokenizer.decode(tokens.ids[a:b]).strip()[:3] for a, b in tokens.spans]
    assert answers == ["Yo.", "So."]  # also where the system message moves with the last question


def test_tokens_and_chats_of_mistral_common(tmp_path: Path) -> None:
    """With a ``tekken.json`` that the package brings."""
    common = pytest.importorskip("mistral_common", reason="the package mistral-common is optional")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    (file,) = Path(common.__file__).parent.glob("data/tekken_240911.json")
    (tmp_path / "tekken.json").write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}]}
    recipe = load_recipe({**keys, "tokenizer_use_mistral_common": True})
    tokenizer = load_tokenizer(recipe)
    theirs = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)
    expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=MESSAGES)).tokens
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    plain = theirs.instruct_tokenizer.tokenizer
    for text in ("It's 12345 \u65e5\u672c\u8a9e!\r\n\t ", "Q: <s> no token </s>"[:5], "a"):
        assert tokenizer(text)["input_ids"] == plain.encode(text, bos=True, eos=False)
    (tmp_path / "tekken.json").unlink()
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"tokenizer_use_mistral_common: .* has no tekken\.json"):
        load_tokenizer(recipe)


def test_mistral_common_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.train import requirements

    monkeypatch.setattr(requirements, "_is_there", lambda module: False)
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}]}
    recipe = load_recipe({**keys, "tokenizer_use_mistral_common": True})
    (said,) = requirements.missing_packages(recipe)
    assert "tokenizer_use_mistral_common: true needs the package mistral-common" in said
    assert "pip install mistral-common" in said
