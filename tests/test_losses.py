"""The losses of the later stages against the published formulas, as TRL states them."""

import math
import types

import pytest
import torch
import torch.nn.functional as F

import prepare
from model import (
    GPT,
    GPTConfig,
    completion_loss,
    group_advantages,
    k3,
    policy_loss,
    preference_loss,
    token_log_probs,
)


def test_log_probs_of_tokens_and_their_gradients(monkeypatch):
    monkeypatch.setattr("model.LOGITS_IN_A_CHUNK", {"cpu": 31 * 128})
    x, w = torch.randn(300, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    head = types.SimpleNamespace(
        logits=lambda x: x @ w.T, config=types.SimpleNamespace(vocab_size=31)
    )
    targets = torch.randint(31, (300,))
    targets[::3] = -1
    share = torch.randn(300)
    for temperature in (1.0, 0.7):
        ours = token_log_probs(head, x, targets, temperature)
        plain = (x @ w.T / temperature).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[
            :, 0
        ] * (targets >= 0)
        assert (ours - plain).abs().max() < 1e-5
        for a, b in zip(
            torch.autograd.grad((ours * share).sum(), (x, w)),
            torch.autograd.grad((plain * share).sum(), (x, w)),
            strict=True,
        ):
            assert (a - b).abs().max() < 1e-4


def test_model_gives_them_too():
    model, idx = (
        GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32)),
        torch.randint(50, (3, 16)),
    )
    targets = idx.roll(-1, 1)
    targets[:, :4] = -1
    each, mean = model(idx, targets, per_token=True)[1], model(idx, targets)[1]
    assert each.shape == (3, 16) and not each[:, :4].any()
    assert (-each.sum() / (targets >= 0).sum() - mean).abs() < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_preferences_against_the_published_formulas(smoothing):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = 20 * torch.randn(
        4, 100, dtype=torch.double
    )
    beta, chosen, rejected = 0.3, policy_chosen - ref_chosen, policy_rejected - ref_rejected
    logits = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    dpo = -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
    assert (preference_loss("sigmoid", chosen, rejected, beta, smoothing) - dpo).abs().max() < 1e-6
    apo_zero = 1 - F.sigmoid(beta * chosen) + F.sigmoid(beta * rejected)
    assert (preference_loss("apo_zero", chosen, rejected, beta) - apo_zero).abs().max() < 1e-6
    apo_down = F.sigmoid(beta * chosen) + 1 - F.sigmoid(beta * (chosen - rejected))
    assert (preference_loss("apo_down", chosen, rejected, beta) - apo_down).abs().max() < 1e-6


def test_preferences_by_hand():
    """The policy made the chosen answer e^1 likelier than the reference did, the rejected one e^-1.

    At beta 0.5 the margin is 0.5 (1 - (-1)) = 1, and -log sigmoid(1) = log(1 + e^-1) = 0.3133."""
    one = torch.tensor([1.0])
    assert preference_loss("sigmoid", one, -one, 0.5).item() == pytest.approx(
        math.log(1 + math.exp(-1)), abs=1e-6
    )
    # 1 - sigmoid(0.5) + sigmoid(-0.5) = 2 (1 - 0.6225) = 0.7551
    assert preference_loss("apo_zero", one, -one, 0.5).item() == pytest.approx(0.755081, abs=1e-6)


def test_policy_gradient_against_the_published_formula():
    new, old, ref, advantages = torch.randn(4, 6, 20, dtype=torch.double)
    ratio = torch.exp(new - old)
    published = -torch.min(ratio * advantages, torch.clamp(ratio, 1 - 0.2, 1 + 0.2) * advantages)
    assert (policy_loss(new, old, advantages, 0.2) - published).abs().max() < 1e-6
    kl = torch.exp(ref - new) - (ref - new) - 1
    assert (
        policy_loss(new, old, advantages, 0.2, ref, 0.04) - (published + 0.04 * kl)
    ).abs().max() < 1e-6
    assert (k3(new, new) == 0).all() and (k3(new, ref) >= 0).all()


def test_on_policy_its_gradient_is_reinforce():
    """At ratio 1 the gradient of a token's loss is -advantage x the gradient of its log p."""
    log_probs, advantages = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    (grad,) = torch.autograd.grad(
        policy_loss(log_probs, log_probs.detach(), advantages).sum(), log_probs
    )
    assert torch.allclose(grad, -advantages)


def test_advantages_within_a_group():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    plain, scaled = group_advantages(rewards), group_advantages(rewards, scale=True)
    assert (
        torch.equal(plain[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
        and not plain[1].any()
        and not scaled[1].any()
    )
    assert scaled[2, 3].item() == pytest.approx(0.75 / (0.5 + 1e-4))


@pytest.mark.parametrize("value", [0.1, 0.3, -0.7, 1e-30, 1e30])
@pytest.mark.parametrize("scale", [False, True])
def test_equal_rewards_give_no_advantage_at_all(value, scale):
    """A mean of equal numbers is rounded: eight of 0.1 left 7e-9, to Muon as good as any."""
    rewards = torch.tensor([[value] * 8, [value] * 7 + [2 * value]])
    advantages = group_advantages(rewards, scale)
    assert not advantages[0].any() and advantages[1].all()


def test_completions_without_an_advantage_are_left_out_of_the_products_only():
    """The gradient of the step is the same with them and without; they count in its mean."""
    problems = types.SimpleNamespace(tokenizer=types.SimpleNamespace(eos_id=0))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=32, block_size=32))
    completions = [
        (list(range(3, 5 + n)), list(range(10, 14 + n)), n != 4, float(n % 2)) for n in range(8)
    ]
    for advantages in ([0.0, 0, 0.5, -0.5, 0, 1, -1, 0], [0.0] * 8):
        seen = []
        for keep_all in (True, False):
            model.zero_grad()
            batch = prepare.Problems.rollouts(
                problems, completions, torch.tensor(advantages), keep_all
            )
            loss, _ = completion_loss(model, None, batch)
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            seen.append((len(batch.x), batch.units, batch.with_signal, batch.tokens, gradients))
        (_, *same, whole), (rows, *same_too, part) = seen
        assert same == same_too and rows == max(1, sum(a != 0 for a in advantages))
        assert torch.allclose(whole, part, atol=1e-7) and (part.abs().sum() > 0) == any(advantages)
