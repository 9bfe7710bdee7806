"""What is expected to be refused, by architecture, method and check, with the class of the error and the reason."""

from dataclasses import dataclass

ALL_METHODS = "batch sample token"


@dataclass(frozen=True)
class Refusal:
    """One kind of refusal, and where it is met."""

    reason: str
    error: str
    families: str
    methods: str = ALL_METHODS
    checks: str = "adding"

    def covers(self, family: str, method: str, check: str) -> bool:
        listed = self.families.split(), self.methods.split(), self.checks.split(", ")
        return family in listed[0] and method in listed[1] and check in listed[2]


REFUSALS = (
    Refusal(
        "A convolution mixes positions: no token's route fits its output. Route by sample.",
        "ConfigError",
        "squeezebert resnet regnet bit efficientnet mobilenet-v2 poolformer mobilevitv2 encodec cnn "
        "timm-convnext timm-resnet timm-efficientnet timm-efficientvit diffusers-unet-convolutions "
        "diffusers-autoencoder-convolutions",
        "token",
    ),
    Refusal("r is larger than the width of the first convolution, 1.", "ConfigError", "superpoint"),
    Refusal(
        "The parent reads the weights of these layers and never calls them. Adapt its other layers.",
        "ConfigError",
        "wavlm attention",
    ),
    Refusal(
        "The attention reads the weight of its `qkv` and never calls it. Set its `qkv_bias_separate`: then it does.",
        "ConfigError",
        "timm-beit-qkv timm-swin-v2-qkv",
    ),
    Refusal(
        "The base mixes the samples of a batch, so that a row belongs to no sample. Route by batch.",
        "ConfigError",
        "autoformer x-clip",
        "sample token",
    ),
    Refusal(
        "The images of all samples stand in one row. Route by token or by batch.",
        "ConfigError",
        "mistral3 llava-pixtral",
        "sample",
    ),
    Refusal(
        "The keys and values of cross-attention come from another sequence, whose tokens have no routes; the mean of "
        "the text's routes would tell later tokens. Route by sample, or leave these layers out.",
        "RouteError",
        "gpt2-cross-attention blip idefics mllama",
        "token",
        "start",
    ),
    Refusal(
        "A mixture sends tokens to its experts, which do not say whose they are. Route by batch.",
        "ConfigError",
        "mixture-experts",
        "sample token",
    ),
    Refusal(
        "The order of tokens and samples is not the same in all parts. Say `samples_first` in the configuration.",
        "ConfigError",
        "transformer-encoder-tokens-first-outside lstm-tokens-first",
        "sample token",
    ),
    Refusal(
        "The first layers are called on pieces of the characters, which make no route. Leave the first encoder out.",
        "RouteError",
        "canine",
        checks="start",
    ),
    Refusal(
        "The network is reversible: its forward has no gradients, so that a router learns nothing. Pin or give the "
        "route.",
        "RouteError",
        "reformer",
        checks="training",
    ),
    Refusal(
        "Two layers share one weight, which cannot hold the updates of both.",
        "TuckaError",
        "zamba zamba2",
        checks="merging",
    ),
    Refusal(
        "The layer computes with a weight that it makes from its own, such as a standardised one.",
        "TuckaError",
        "bit encodec",
        "batch sample",
        "merging",
    ),
    Refusal(
        "LoRA's rank for so large a kernel exceeds that of the tiny weight.",
        "ConfigError",
        "bit resnet encodec cnn diffusers-unet-convolutions diffusers-autoencoder-convolutions",
        "batch sample",
        "export",
    ),
    Refusal(
        "Torch's encoder layer reads the weights in evaluation and passes LoRA by. Merge instead.",
        "ConfigError",
        "transformer-encoder transformer transformer-encoder-tokens-first transformer-encoder-tokens-first-declared "
        "transformer-tokens-first",
        checks="export",
    ),
    Refusal(
        "Torch's encoder layer reads the weights in evaluation and passes LoRA by. Merge instead.",
        "ConfigError",
        "transformer-encoder-tokens-first-outside",
        "batch",
        "export",
    ),
)


def refusal_of(family: str, method: str, check: str) -> Refusal | None:
    """Find why something is refused; None where it is not expected to be."""
    return next((entry for entry in REFUSALS if entry.covers(family, method, check)), None)
