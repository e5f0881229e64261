"""Answers computed together are transformers' answers one by one, in every family and however they are scheduled."""

import pytest
import torch
from tests.generate.conftest import drive
from tests.models.families import FAMILIES, make, quantized

from gazelle.base.errors import OptionError
from gazelle.generate.batcher import Batcher
from gazelle.generate.options import Sampling


def model_of(family="llama", seed=3, **sizes):
    model = make(family, seed, **sizes).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_tokens", [512, 9])
def test_every_family(family, step_tokens, letters, alone, prompts):
    """Some begin within LongRoPE's original context or the window, some beyond; prompts are cut into pieces."""
    model = model_of(family)
    rows = prompts(1, 5, 17, 33, 40, 70)
    with Batcher(model, letters, step_tokens=step_tokens, page_size=4) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=12)) for row in rows]
        drive(batcher)
    assert [request.tokens for request in requests] == [alone(model, row, 12) for row in rows]
    assert all(request.finish_reason == "length" for request in requests)


def test_the_model_comes_back_as_it_was(letters):
    model = model_of()
    model.train()
    model.model.norm.eval()
    before, attention = dict(model.state_dict()), model.config._attn_implementation
    with Batcher(model, letters) as batcher:
        batcher.submit([1, 2, 3], Sampling(max_new_tokens=2))
        drive(batcher)
        assert model.config._attn_implementation == attention
    assert model.training and not model.model.norm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_requests_join_and_leave_at_any_time(letters, alone, prompts):
    model = model_of("gemma3")
    rows = prompts(*range(1, 30, 2))
    with Batcher(model, letters, max_running=3, page_size=4) as batcher:
        requests = []
        for number, row in enumerate(rows):
            requests.append(batcher.submit(row, Sampling(max_new_tokens=2 + number % 5)))
            batcher.step()
            assert batcher.running <= 3
        drive(batcher)
        assert batcher.cached_tokens == 0
    for number, (request, row) in enumerate(zip(requests, rows, strict=True)):
        assert request.tokens == alone(model, row, 2 + number % 5)


def test_short_of_pages_the_newest_makes_room_and_comes_again(letters, alone, prompts):
    model = model_of()
    rows = prompts(9, 10, 11, 12)
    with Batcher(model, letters, cache_tokens=48, page_size=4) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=30)) for row in rows]
        drive(batcher)
        assert batcher.preempted > 0
    assert [request.tokens for request in requests] == [alone(model, row, 30) for row in rows]


@pytest.mark.parametrize("share", [True, False])
def test_a_beginning_in_common_is_computed_once(share, letters, alone, prompts):
    model = model_of("mistral")
    beginning, *ends = prompts(37, 3, 5, 9)
    rows = [beginning + end for end in ends] + [beginning]
    computed = []
    with Batcher(model, letters, share_prefixes=share, page_size=4) as batcher:
        run = batcher.runner.run
        batcher.runner.run = lambda given: computed.extend(len(row.ids) for row in given) or run(given)
        requests = [batcher.submit(row, Sampling(max_new_tokens=6)) for row in rows]
        drive(batcher)
        assert sum(computed) == sum(map(len, rows)) + 4 * 5 - (3 * 36 if share else 0)
        assert [request.reused for request in requests] == ([0, 36, 36, 36] if share else [0] * 4)
        again = batcher.submit(rows[0] + requests[0].tokens, Sampling(max_new_tokens=4))
        drive(batcher)
        assert again.reused == (44 if share else 0)
    assert [request.tokens for request in requests] == [alone(model, row, 6) for row in rows]
    assert again.tokens == alone(model, rows[0] + requests[0].tokens, 4)


def test_a_cancelled_request_frees_its_cache_at_the_next_step(letters):
    with Batcher(model_of(), letters, max_running=1) as batcher:
        first = batcher.submit([1] * 20, Sampling(max_new_tokens=50))
        second = batcher.submit([2] * 20, Sampling(max_new_tokens=50))
        batcher.step()
        assert batcher.running == 1 and batcher.waiting == 1 and batcher.cached_tokens > 0
        batcher.cancel(first)
        batcher.cancel(second)
        events = batcher.step()
        assert {event.request for event in events} == {first, second}
        assert all(event.finish_reason == "cancelled" for event in events)
        assert batcher.cached_tokens == 0 and not batcher.busy


def test_ends_at_stop_tokens_and_stop_strings(letters, alone):
    model = model_of("qwen3", num_hidden_layers=4)
    prompt = [5, 6, 7, 8]
    answer = alone(model, prompt, 12)
    place = next(at for at in range(11, 1, -1) if answer[at] not in answer[:at])
    word = letters.decode(answer[place:place + 2])
    first = letters.decode(answer).find(word)
    with Batcher(model, letters) as batcher:
        by_token = batcher.submit(prompt, Sampling(max_new_tokens=12, stop_token_ids=(answer[place],)))
        by_text = batcher.submit(prompt, Sampling(max_new_tokens=12, stop=(word,)))
        events = drive(batcher)
    assert by_token.tokens == answer[:place + 1] and by_token.finish_reason == "stop"
    assert by_token.text == letters.decode(answer[:place])
    assert by_text.text == letters.decode(answer)[:first] and by_text.finish_reason == "stop"
    shown = "".join(event.text for event in events if event.request is by_text)
    assert shown == by_text.text


def test_logprobs_are_those_of_a_pass_alone(letters):
    model = model_of()
    with Batcher(model, letters) as batcher:
        request = batcher.submit([3, 4, 5], Sampling(max_new_tokens=5, logprobs=3, temperature=0.8, seed=1))
        batcher.submit([9] * 30, Sampling(max_new_tokens=5))
        logprobs = [entry for event in drive(batcher) if event.request is request for entry in event.logprobs]
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5, *request.tokens]])).logits[0, 2:-1]
    for entry, token, row in zip(logprobs, request.tokens, logits.log_softmax(-1), strict=True):
        assert entry.token == token and entry.logprob == pytest.approx(float(row[token]), abs=1e-5)
        values, tokens = row.topk(3)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_draws_depend_on_the_seed_alone(letters, prompts):
    model = model_of()
    how = Sampling(max_new_tokens=15, temperature=1.5, top_p=0.9, seed=11)
    answers = []
    for others in (0, 5):
        with Batcher(model, letters) as batcher:
            for row in prompts(*[8] * others):
                batcher.submit(row, Sampling(max_new_tokens=9, temperature=1.0))
            request = batcher.submit([3, 4, 5], how)
            drive(batcher)
        answers.append(request.tokens)
    assert answers[0] == answers[1]


def test_a_nan_ends_its_own_request_and_no_other(letters, alone, prompts):
    """NaN in the cache would reach whoever gets the page next, behind any mask; pages it shares are left alone."""
    model = model_of()
    rows = prompts(14, 7, seed=5)
    poison = 96
    rows = [[token for token in row if token != poison] for row in rows]
    want = [alone(model, row, 5) for row in rows]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    with Batcher(model, letters, page_size=4, cache_tokens=64) as batcher:
        fine = batcher.submit(rows[0], Sampling(max_new_tokens=5))
        broken = batcher.submit([*rows[0][:9], poison, 4], Sampling(max_new_tokens=5))
        events = drive(batcher)
        later = batcher.submit(rows[1], Sampling(max_new_tokens=5))
        drive(batcher)
    assert broken.finish_reason == "error" and broken.tokens == [] and broken.reused == 8
    assert any("NaN" in str(event.error) for event in events if event.request is broken)
    assert fine.tokens == want[0] and later.tokens == want[1]


@pytest.mark.parametrize(("ids", "options", "adapter", "where"), [
    ([], {}, None, "prompt"), ([1, 97], {}, None, "prompt"), ([-1], {}, None, "prompt"),
    ([1] * 120, {"max_new_tokens": 9}, None, "prompt, max_new_tokens"), ([1], {}, "../secret", "adapter")])
def test_what_cannot_be_answered_is_refused_at_once(ids, options, adapter, where, letters):
    with Batcher(model_of(), letters) as batcher:
        with pytest.raises(OptionError) as caught:
            batcher.submit(ids, Sampling(**{"max_new_tokens": 4} | options), adapter)
        assert caught.value.where == where and not batcher.busy


def test_without_a_limit_the_context_is_the_limit(letters):
    with Batcher(model_of(), letters, max_context=20) as batcher:
        request = batcher.submit([1] * 8, Sampling(max_new_tokens=None))
        drive(batcher)
    assert len(request.tokens) == 12


def test_a_model_whose_attention_cannot_be_swapped_answers_one_by_one(letters, alone, prompts, caplog):
    import transformers

    config = transformers.GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, window_size=8,
                                       attention_types=[[["global", "local"], 1]], max_position_embeddings=128,
                                       bos_token_id=1, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(config).eval()
    rows = prompts(3, 20, 11)
    with Batcher(model, letters, step_tokens=4) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=6)) for row in rows]
        drive(batcher)
    assert "one by one" in caplog.text
    assert [request.tokens for request in requests] == [alone(model, row, 6) for row in rows]


def test_a_model_on_the_engine(letters, alone, prompts):
    """Its layers answer as Hugging Face wrote them, since a cache goes with them, and train on the engine as before."""
    from gazelle.models.swap import accelerate, runs_on_engine

    model = model_of("qwen3")
    rows = prompts(4, 19, 30)
    want = [alone(model, row, 8) for row in rows]
    accelerate(model)
    assert runs_on_engine(model)
    with Batcher(model, letters, page_size=4) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=8)) for row in rows]
        drive(batcher)
    assert [request.tokens for request in requests] == want and runs_on_engine(model)


def test_weights_in_four_bits_under_an_adapter(letters, alone, prompts, tmp_path):
    """The batch is one product of dequantised weights, as alone; on a CPU in float32 both give the same tokens."""
    model = quantized(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4").eval()
    model.generation_config.eos_token_id = None
    rows = prompts(4, 19, 30)
    with model.disable_adapter():
        plain = [alone(model, row, 8) for row in rows]
    tuned = [alone(model, row, 8) for row in rows]
    with Batcher(model, letters, page_size=4) as batcher:
        requests = [batcher.submit(row, Sampling(max_new_tokens=8), name)
                    for name in (None, "__base__") for row in rows]
        drive(batcher)
    assert [request.tokens for request in requests] == tuned + plain and tuned != plain
