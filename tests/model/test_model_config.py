import pytest

from isheep.config import UserError, model_presets
from isheep.model.config import ModelConfig
from tests.tiny import config_json


def read(name="llama_gqa", **changes):
    return ModelConfig.from_dict(config_json(name, **changes))


def test_what_a_config_may_leave_out():
    raw = {k: v for k, v in config_json("qwen2_mha").items() if k not in ("num_key_value_heads", "eos_token_id")}
    config = ModelConfig.from_dict({**raw, "head_dim": None})
    assert (config.num_key_value_heads, config.head_dim, config.eos_token_ids) == (6, 8, ())


def test_bias_belongs_to_the_architecture():
    assert [
        (c.qkv_bias, c.out_bias, c.mlp_bias, c.qk_norm) for c in map(read, ("qwen2_mha", "llama_gqa", "qwen3_head_dim"))
    ] == [
        (True, False, False, False),
        (False, False, False, False),
        (False, False, False, True),
    ]
    assert read(attention_bias=True).out_bias


def test_end_tokens_are_one_or_several():
    assert read(eos_token_id=7).eos_token_ids == (7,)
    assert read(eos_token_id=[7, 9]).eos_token_ids == (7, 9)


def test_rope_in_the_old_and_the_new_writing():
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = read(rope_theta=500.0, rope_scaling=scaling)
    new = read(rope_theta=None, rope_parameters={**scaling, "rope_theta": 500.0})
    assert old.rope_theta == new.rope_theta == 500.0
    assert old.rope_scaling["factor"] == new.rope_scaling["factor"] == 4.0
    assert read(rope_scaling={"type": "linear", "factor": 4.0}).rope_scaling["rope_type"] == "linear"
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        ({"architectures": None}, r"\(none\)"),
        ({"hidden_act": "gelu"}, 'activation "gelu"; only "silu"'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope scaling "yarn"'),
    ],
)
def test_what_this_decoder_does_not_have(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_a_torn_config_says_what_is_lacking():
    raw = config_json("llama_gqa")
    del raw["hidden_size"], raw["num_attention_heads"]
    with pytest.raises(UserError, match="lacks hidden_size, num_attention_heads"):
        ModelConfig.from_dict(raw)


def test_every_preset_describes_a_model():
    for preset in model_presets().values():
        config = ModelConfig.from_dict(preset.architecture)
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert config.rope_scaling is None and config.context_len >= 4096
