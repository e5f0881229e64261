"""A classifier as judge: a tiny BERT whose head is set by hand, and callables like a pipeline."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, pipeline
from transformers import PreTrainedTokenizerFast as Fast

from gazelle import SafetyChecker
from gazelle.base.errors import ModelError, OptionError
from gazelle.guard.checker import REFUSAL

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "nice", "day", "vile", "insult", "and"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says "toxic" of texts with a bad word: attention is even, so [CLS] sees the mean of all words."""
    path = tmp_path_factory.mktemp("classifier")
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    Fast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16).save_pretrained(path)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, id2label={0: "safe", 1: "toxic"}, label2id={"safe": 0, "toxic": 1})).eval()
    with torch.no_grad():
        embedding = model.bert.embeddings
        for table in (embedding.word_embeddings, embedding.position_embeddings, embedding.token_type_embeddings):
            table.weight.zero_()
        embedding.word_embeddings.weight[:, 0] = 1.0
        embedding.word_embeddings.weight[6:8, 1] = 8.0  # the bad words
        layer = model.bert.encoder.layer[0]
        for linear in (
            layer.attention.self.query,
            layer.attention.self.key,
            layer.intermediate.dense,
            layer.output.dense,
        ):
            linear.weight.zero_()
            linear.bias.zero_()
        for linear in (layer.attention.self.value, layer.attention.output.dense):
            linear.weight.copy_(torch.eye(16))
            linear.bias.zero_()
        model.bert.pooler.dense.weight.copy_(torch.eye(16))
        model.bert.pooler.dense.bias.zero_()
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.weight[1, 1] = 1.0
        clean, bad = (float(model(torch.tensor([[2, 4, word, 3]])).logits[0, 1]) for word in (5, 6))
        model.classifier.weight[1, 1] = 6 / (bad - clean)  # logits of -3 and 3
        model.classifier.bias[1] = -3 * (bad + clean) / (bad - clean)
    model.save_pretrained(path)
    return path


def test_a_model_from_a_folder(folder):
    checker = SafetyChecker(classifier=folder, max_reject_score=0.8)
    assert checker.filter("nice day") == "nice day"
    verdict = checker.check("vile insult")
    assert checker.filter("vile insult") == REFUSAL and not verdict.allowed
    assert [(found.kind, found.start, found.end) for found in verdict.findings] == [("unsafe", 0, 11)]
    assert verdict.reasons == ("the classifier says 'toxic'",)


def test_scores_are_those_of_the_pipeline(folder):
    judge = pipeline("text-classification", model=str(folder), top_k=None, device="cpu")
    for text in ("nice day", "vile insult and nice day", "vile"):
        wanted = {entry["label"]: entry["score"] for entry in judge([text])[0]}["toxic"]
        assert SafetyChecker(classifier=folder).check(text).score == pytest.approx(wanted, abs=1e-6)
        assert SafetyChecker(classifier=judge).check(text).score == pytest.approx(wanted, abs=1e-6)


def test_the_end_of_a_long_text_is_read_too(folder):
    long = "nice day and " * 30
    checker = SafetyChecker(classifier=folder)
    assert checker.check(long).allowed and not checker.check(long + "vile insult " * 6).allowed


def test_the_limit_decides(folder):
    score = SafetyChecker(classifier=folder).check("vile insult").score
    assert 0.9 < score < 0.9999
    assert SafetyChecker(classifier=folder, max_reject_score=score).check("vile insult").allowed
    assert SafetyChecker(classifier=folder, labels=["safe"]).check("nice day").allowed is False


def test_callables():
    top = SafetyChecker(classifier=lambda texts: [{"label": "NEUTRAL", "score": 0.9} for _ in texts])
    assert top.check("x").score == pytest.approx(0.1) and top.check("  ").score == 0
    with pytest.raises(ModelError, match="not understood"):
        SafetyChecker(classifier=lambda texts: [3]).check("x")
    with pytest.raises(ModelError, match="no probabilities"):
        SafetyChecker(classifier=lambda texts: [[{"label": "toxic", "score": 4.2}]]).check("x")


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        SafetyChecker(classifier=tmp_path / "nowhere")
    with pytest.raises(OptionError, match="no such label") as caught:
        SafetyChecker(classifier=folder, labels=["toxik"])
    assert "did you mean 'toxic'" in str(caught.value)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.save_pretrained(tmp_path)
    Fast.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="which of the classifier's labels"):
        SafetyChecker(classifier=tmp_path)


def test_weights_that_are_pickled_are_refused(folder, tmp_path):
    Fast.from_pretrained(folder).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        SafetyChecker(classifier=tmp_path)
