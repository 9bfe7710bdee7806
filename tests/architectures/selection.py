"""The architectures that the sweep runs by default, and those that are compiled: the best known ones of each kind."""

from importlib.util import find_spec

from architectures.families import FAMILIES
from architectures.of_diffusers import DIFFUSERS
from architectures.of_timm import TIMM
from architectures.plain import PLAIN

LIBRARIES = {"timm": TIMM, "diffusers": DIFFUSERS}
ABSENT = [library for library in LIBRARIES if find_spec(library) is None]
# What can be run here, and what cannot since its library is not installed.
_OTHERS = {name: row for rows in LIBRARIES.values() for name, row in rows.items()}
ALL = {**FAMILIES, **PLAIN, **{name: row for name, row in _OTHERS.items() if row.library not in ABSENT}}
NOT_RUN = {name: row.library for name, row in _OTHERS.items() if row.library in ABSENT}

_ENCODERS = """
    bert bert-multiple-choice roberta xlm-roberta camembert albert electra distilbert deberta deberta-v2 deberta-v3
    xlnet mpnet longformer big-bird funnel modernbert nomic-bert eurobert convbert mobilebert squeezebert fnet
    canine roformer esm reformer perceiver luke layoutlm layoutlmv3 lilt tapas
"""
_CAUSALS = """
    llama llama-classifier mistral qwen2 qwen3 gemma gemma2 gemma3-text gemma3n-text gemma4-text phi phi3 olmo2
    stablelm granite cohere starcoder2 nemotron glm4 smollm3 opt opt-350m xglm biogpt gpt2 gpt2-classifier
    gpt2-cross-attention gptj gpt-neo gpt-neox gpt-bigcode bloom falcon codegen mpt mixtral dbrx qwen2-moe qwen3-moe
    olmoe gpt-oss deepseek-v2 deepseek-v3 llama4-text qwen3-next mamba mamba2 falcon-mamba jamba bamba zamba2
    recurrent-gemma rwkv lfm2
"""
_SEQ2SEQS = """
    t5 t5-encoder mt5 longt5 switch bart mbart pegasus pegasus-x led m2m100 nllb-moe marian fsmt blenderbot
    prophetnet encoder-decoder whisper speech2text moonshine vision-encoder-decoder donut pix2struct udop
    time-series-transformer informer autoformer patchtst patchtsmixer
"""
_VISIONS = """
    vit deit beit dinov2 dinov3 vit-mae swin swinv2 hiera convnext resnet bit efficientnet mobilenet-v2 pvt
    segformer mobilevit levit videomae timesformer vivit detr conditional-detr rt-detr mask2former sam sam2 dpt
    vitdet
"""
_AUDIOS = "wav2vec2 hubert wavlm wav2vec2-conformer sew-d clap ast parakeet encodec"
_MULTIMODALS = """
    clip siglip align clipseg groupvit x-clip owlvit flava vilt visual-bert lxmert bridgetower llava llava-next
    paligemma gemma3 mllama idefics idefics2 idefics3 internvl mistral3 qwen2-vl qwen2.5-vl qwen3-vl blip blip-2
    instructblip git kosmos-2 florence-2 qwen2-audio musicgen
"""
CHOSEN = [*" ".join((_ENCODERS, _CAUSALS, _SEQ2SEQS, _VISIONS, _AUDIOS, _MULTIMODALS)).split(), *PLAIN, *_OTHERS]
COMPILED = ("bert", "deberta-v3", "llama", "gpt2", "vit", "transformer-encoder", "timm-vit", "diffusers-dit")
