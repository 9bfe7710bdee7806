"""Generation that encodes one window after the other: each pass of the encoder has a route of its own."""

import logging

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.utils.logging import get_verbosity, set_verbosity

from support.routed import routed
from tucka.backends.torch.routing.scope import scope_of

SIZES = {
    **{"vocab_size": 60, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"max_source_positions": 30, "max_target_positions": 60, "pad_token_id": 0, "bos_token_id": 1},
    **{"decoder_start_token_id": 2, "eos_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
}
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
FALLBACK = {"temperature": (0.0, 0.4), "logprob_threshold": -0.5, "compression_ratio_threshold": 1.35}
WAYS = {"greedy": {}, "beams": {"num_beams": 2}, "language": {"language": None}, "fallback": FALLBACK}


@pytest.fixture(autouse=True)
def _quiet():
    before = get_verbosity()
    set_verbosity(logging.ERROR)  # of lengths that Whisper itself sets
    yield
    set_verbosity(before)


def whisper(routing):
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(WhisperConfig(**SIZES, init_std=0.3))
    languages = {"is_multilingual": True, "lang_to_id": {"<|en|>": 10}, "task_to_id": {"transcribe": 12}}
    for name, value in {**languages, "no_timestamps_token_id": 40}.items():
        setattr(base.generation_config, name, value)
    return routed(base, ["q_proj", "v_proj", "fc1"], routing)


def sound(*frames):
    generator = torch.Generator().manual_seed(1)
    features = torch.zeros(len(frames), 8, max(frames), dtype=torch.float64)
    mask = torch.zeros(len(frames), max(frames), dtype=torch.long)
    for row, length in enumerate(frames):
        features[row, :, :length] = torch.randn(8, length, generator=generator, dtype=torch.float64)
        mask[row, :length] = 1
    return {"input_features": features, "attention_mask": mask}


def said(model, inputs, **options):
    options = {"language": "en", "return_timestamps": True, "max_new_tokens": 6, "do_sample": False, **options}
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


def passes(model):
    """The route of each pass of the encoder, and those that the decoder used after it."""
    found, inner = [], model.base_model.model.model
    scope_of(model).router("default").register_forward_hook(lambda _router, _args, gates: found.append((gates, [])))
    query = inner.decoder.layers[0].self_attn.q_proj
    query.register_forward_hook(
        lambda layer, args, _out: found[-1][1].append(scope_of(model).fit("default", layer, args[0]).gates)
    )
    return found


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("frames", [(60, 60), (150, 70)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_each_window_has_a_route_of_its_own(routing, frames, way):
    model = whisper(routing)
    found = passes(model)
    said(model, sound(*frames), **WAYS[way])
    assert len(found) >= max(frames) // 60
    windows = [window for window in found if window[1]]  # the last pass may only tell that nothing is left
    assert windows
    for made, used in windows:
        wanted = made if made.ndim < 4 else made.mean(dim=1)
        for gates in used:
            times = 1 if gates.ndim == 2 else gates.shape[0] // wanted.shape[0]
            torch.testing.assert_close(gates, wanted if times == 1 else wanted.repeat_interleave(times, dim=0))
    if max(frames) > 60:
        assert len({tuple(made.flatten().tolist()) for made, _ in windows}) > 1


@pytest.mark.parametrize("routing", ["sample", "token"])
def test_rows_of_several_windows_stand_alone(routing):
    model, inputs = whisper(routing), sound(150, 70, 110)
    together = said(model, inputs)
    for row, length in enumerate((150, 70, 110)):
        alone = said(model, {key: value[row : row + 1, ..., :length] for key, value in inputs.items()})[0]
        assert torch.equal(together[row][: len(alone)], alone)
        assert not together[row][len(alone) :].any()
