"""A few prompts answered before and after training, so that the report shows what changed."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gazelle.data.conversation import Conversation
from gazelle.models.generate import generate_texts


@dataclass
class Sample:
    """A prompt as chat messages, the answer the data gives, and what the model said before and after training."""

    messages: list[dict[str, Any]]
    expected: str
    before: str = ""
    after: str = ""

    @property
    def prompt(self) -> str:
        """The last thing said before the answer."""
        return str(self.messages[-1]["content"])


def pick_samples(conversations: list[Conversation], count: int) -> list[Sample]:
    """`count` conversations spread evenly over the data, each cut before its last assistant turn. Raw text has none."""
    usable = [chat for chat in conversations if len(chat.turns) > 1 and chat.turns[-1].role == "assistant"]
    step = max(len(usable) / count, 1)
    chosen = [usable[int(index * step)].messages() for index in range(min(count, len(usable)))]
    return [Sample(messages[:-1], str(messages[-1]["content"])) for messages in chosen]


def answer_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], when: str, max_new_tokens: int
) -> None:
    """Fill in `before` or `after` of every sample with the model's greedy answer."""
    answers = generate_texts(model, tokenizer, [sample.messages for sample in samples], max_new_tokens=max_new_tokens)
    for sample, answer in zip(samples, answers, strict=True):
        setattr(sample, when, answer)
