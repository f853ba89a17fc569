"""The chunked loss against its plain definition, in values, argmax and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from solotune.model import loss


def setup(tokens: int = 37, hidden: int = 16, vocab: int = 50, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return h, weight, labels


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_any_chunking_gives_the_plain_losses_and_gradients(monkeypatch, chunk):
    h, weight, labels = setup()
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", chunk * weight.shape[0])
    head = lambda x: torch.tanh(F.linear(x, weight) / 3) * 3  # noqa: E731 - a head that caps its logits
    h1, h2 = h.clone().requires_grad_(), h.clone().requires_grad_()
    weights = torch.rand(len(labels))  # every token its own weight
    losses, hits = loss.token_losses(h1, labels, head, weight.shape[0])
    (losses * weights).sum().backward()
    logits = head(h2).float()
    plain = F.cross_entropy(logits, labels, reduction="none")
    (plain * weights).sum().backward()
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h1.grad, h2.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(hits, logits.argmax(-1) == labels)


def test_without_gradients_the_values_are_the_same():
    h, weight, labels = setup()
    head = lambda x: F.linear(x, weight)  # noqa: E731
    with_grad, hits = loss.token_losses(h.clone().requires_grad_(), labels, head, 50)
    with torch.no_grad():
        without, same_hits = loss.token_losses(h, labels, head, 50)
    torch.testing.assert_close(with_grad, without, rtol=0, atol=0)
    assert torch.equal(hits, same_hits)


def test_bfloat16_error_is_no_larger_than_the_plain_paths_own(monkeypatch):
    h, weight, labels = setup(tokens=512, hidden=64, vocab=1000)
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", 100 * 1000)
    truth_h = h.clone().requires_grad_()
    F.cross_entropy(F.linear(truth_h, weight), labels).backward()

    def error(path):
        low = h.bfloat16().requires_grad_()
        path(low).backward()
        return (low.grad.double() - truth_h.grad).abs().max().item()

    head = lambda x: F.linear(x, weight.bfloat16())  # noqa: E731
    plain = error(lambda x: F.cross_entropy(head(x).float(), labels))
    ours = error(lambda x: loss.token_losses(x, labels, head, 1000)[0].mean())
    assert ours <= 1.1 * plain


def test_prompt_positions_never_reach_the_head():
    hidden = torch.randn(2, 6, 4)
    ids = torch.randint(0, 9, (2, 6))
    supervised = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    h, labels = loss.supervised_hidden(hidden, ids, supervised)
    assert torch.equal(labels, torch.stack([ids[0, 2], ids[0, 3], ids[1, 5]]))  # the first token has no predecessor
    assert torch.equal(h, torch.stack([hidden[0, 1], hidden[0, 2], hidden[1, 4]]))


def test_no_supervised_token_gives_no_loss_and_a_gradient_of_zero():
    h = torch.randn(0, 4, requires_grad=True)
    losses, hits = loss.token_losses(h, torch.zeros(0, dtype=torch.long), lambda x: x, 4)
    losses.sum().backward()
    assert losses.shape == hits.shape == (0,)
