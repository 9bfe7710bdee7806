"""What torch and transformers do not promise to keep: each name is still there and means the same."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import (
    CanineConfig,
    CanineModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from tucka.backends.torch import private


def regions_in(run):
    """The regions that a function sees in its forward and in the recomputation, innermost first."""
    seen = []

    def inside(x):
        seen.append([private.checkpoint_frame(), *private.outer_checkpoint_frames()])
        return x.sin()

    run(inside, torch.ones(2, requires_grad=True)).sum().backward()
    return seen


def in_one(function, x):
    return checkpoint(function, x, use_reentrant=False)


def in_two(function, x):
    return in_one(lambda y: in_one(function, y).cos(), x)


def test_a_checkpointed_region_is_the_same_object_in_its_recomputation():
    (first,), (again,) = regions_in(in_one)
    assert first[0] is again[0] is not None
    assert (first[1], again[1]) == (False, True)


def test_regions_inside_of_each_other_are_all_seen():
    seen = regions_in(in_two)
    assert [len(regions) for regions in seen[:2]] == [2, 2]
    forward, outer_again = seen[0], seen[1]
    assert outer_again[1][0] is forward[1][0]
    assert outer_again[1][1]
    assert outer_again[0][0] is not forward[0][0]


def test_a_reentrant_region_is_the_same_object_in_its_backward():
    seen = []

    def inside(x):
        seen.append(private.reentrant_checkpoints())
        return x.sin()

    checkpoint(inside, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    ((first, again),), ((same, last),) = seen
    assert first is same
    assert (again, last) == (False, True)
    assert private.has_input_gradients(first)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_reentrant_region_knows_whether_a_backward_may_come():
    seen = []

    def inside(x):
        seen.append([private.has_input_gradients(region) for region, _ in private.reentrant_checkpoints()])
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(inside, x * 2, use_reentrant=True)
    checkpoint(inside, torch.ones(2), use_reentrant=True)
    with torch.no_grad():
        checkpoint(inside, x, use_reentrant=True)
    assert seen == [[True], [False], [False]]


def test_reentrant_regions_inside_of_each_other_are_all_seen():
    seen = []

    def inside(x):
        seen.append(private.reentrant_checkpoints())
        return x.sin()

    def outside(x):
        return checkpoint(inside, x, use_reentrant=True).cos()

    checkpoint(outside, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    assert [[again for _, again in regions] for regions in seen] == [[False, False], [False, True], [True, True]]
    assert seen[0][1][0] is seen[1][1][0] is seen[2][1][0]
    assert seen[0][0][0] is not seen[1][0][0] is seen[2][0][0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_call_is_known_to_be_computed_again(reentrant):
    seen = []

    def inside(x):
        seen.append(private.is_computed_again())
        return x.sin()

    y = checkpoint(inside, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    y.register_hook(lambda _gradient: seen.append(private.is_computed_again()))
    y.sum().backward()
    assert seen == [False, False, True]


def test_backwards_have_numbers_and_an_end():
    assert private.running_backward() == -1
    x, seen = torch.ones(2, requires_grad=True), []

    def look(_gradient):
        seen.append(private.running_backward())
        private.at_end_of_backward(lambda: seen.append("end"))

    x.register_hook(look)
    (x * 2).sum().backward()
    (x * 3).sum().backward()
    assert seen[1::2] == ["end", "end"]
    assert len(set(seen)) == 3
    assert -1 not in seen

    def fail():
        raise KeyError("left")

    x.register_hook(lambda _gradient: private.at_end_of_backward(fail))
    with pytest.raises(KeyError, match="left"):
        (x * 2).sum().backward()


def test_nothing_is_seen_outside_of_regions():
    assert private.reentrant_checkpoints() == []
    assert not private.is_computed_again()
    assert private.checkpoint_frame() == (None, False)
    with torch.autograd.graph.save_on_cpu():
        assert private.checkpoint_frame() == (None, False)
        assert private.outer_checkpoint_frames() == []


@pytest.mark.parametrize("selective", [False, True])
def test_what_is_outside_of_checkpoints_need_not_be_computed_again(selective):
    weight, known = torch.full((), 2.0, requires_grad=True), []

    def inside(x):
        if not known:
            with private.outside_checkpoints():
                known.append((weight * 3).sin())
        return (x * (known[0] if len(known) == 1 else None)).cos()

    def policy(*_args, **_kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    x = torch.ones(3, requires_grad=True)
    checkpoint(inside, x, use_reentrant=False, **options).sum().backward()
    wanted = torch.autograd.grad((torch.ones(3) * (weight * 3).sin()).cos().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, wanted)


def test_tensors_of_transformations_are_told_from_others():
    assert not private.is_transformed(torch.ones(2))
    seen = []
    torch.func.vmap(lambda x: (seen.append(private.is_transformed(x)), x)[1])(torch.ones(2))
    torch.func.grad(lambda x: (seen.append(private.is_transformed(x)), x.sum())[1])(torch.ones(2))
    assert seen == [True, True]


def test_a_model_of_sound_converts_its_mask():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = Wav2Vec2Model(
        Wav2Vec2Config(
            **sizes,
            conv_dim=(4,),
            conv_kernel=(4,),
            conv_stride=(2,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=1,
        )
    )
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 10:] = 0
    converted = private.audio_mask(model, mask, 9)
    assert converted.sum(dim=1).tolist() == [9, 4]
    assert private.audio_mask(nn.Linear(2, 2), mask, 9) is None


def test_an_encoder_of_spectra_converts_its_mask():
    parakeet = pytest.importorskip("transformers.models.parakeet")  # not of 4.56
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = parakeet.ParakeetEncoderConfig(**sizes, num_mel_bins=8, subsampling_conv_channels=4)
    model = parakeet.ParakeetEncoder(config)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 32:] = 0
    assert private.audio_mask(model, mask, 8).sum(dim=1).tolist() == [8, 4]


def test_a_model_of_characters_converts_its_mask():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = CanineModel(CanineConfig(**sizes, downsampling_rate=4, upsampling_kernel_size=2, num_hash_buckets=16))
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[0, 8:] = 0
    assert private.pooled_mask(model, mask, 4).sum() == 2
    assert private.pooled_mask(model, mask, 5) is None
    assert private.pooled_mask(nn.Linear(2, 2), mask, 4) is None


def test_writes_to_a_tensor_are_counted():
    tensor = torch.zeros(2)
    before = private.version_of(tensor)
    tensor.add_(1)
    assert private.version_of(tensor) > before
    with torch.inference_mode():
        assert private.version_of(torch.zeros(2)) == 0


def test_an_assertion_that_waits_is_raised():
    private.assert_later(torch.tensor(True), "no")
    with pytest.raises(RuntimeError, match="the cure"):
        private.assert_later(torch.tensor(False), "the cure")


def test_hooks_on_an_input_are_seen():
    layer = nn.Linear(2, 2)
    assert not private.has_input_hooks(layer)
    layer.register_forward_pre_hook(lambda _module, _args: None)
    assert private.has_input_hooks(layer)


def test_a_container_shows_what_it_holds():
    container = nn.ModuleDict({"a": nn.Linear(1, 1)})
    assert private.modules_by_name(container)["a"] is container["a"]
    assert private.modules_by_name(copy.deepcopy(container)).keys() == {"a"}


def test_copies_of_data_parallel_are_marked():
    module = nn.Linear(2, 2)
    assert not private.is_replica(module)
    assert private.is_replica(module._replicate_for_data_parallel())


def test_marks_of_deepspeed():
    """As it sets them; the slow test with the library itself fails when it sets others."""
    parameter = nn.Parameter(torch.ones(2, 3))
    assert not private.is_in_pieces(parameter)
    assert not private.has_master_copy(parameter)
    assert private.whole_shape(parameter) == (2, 3)
    parameter._hp_mapping = None  # of a rank that trains another part
    assert private.has_master_copy(parameter)
    piece = nn.Parameter(torch.ones(0))
    piece.ds_id, piece.ds_shape = 0, torch.Size((2, 3))
    assert private.is_in_pieces(piece)
    assert not private.has_master_copy(piece)  # as long as no engine has it
    assert private.whole_shape(piece) == (2, 3)
    piece._z3_optimizer = object()
    assert private.has_master_copy(piece)


def test_the_running_wrapper_tells_its_group(tmp_path):
    assert private.data_parallel_group() is None
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append(private.data_parallel_group())
            return super().forward(x)

    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Watching(2, 2))
        wrapped(torch.ones(1, 2))
        assert seen == [wrapped.process_group]
    finally:
        dist.destroy_process_group()
