"""torch.compile changes no gradient, on every version of torch that requirements.txt allows.

Some versions of torch return zero gradients, with the right loss, for a compiled autograd.Function
whose result was last written in place. tests/other_torch.sh runs this file on another version.
"""

import pytest
import torch

from model import GPT, GPTConfig, documents

SMALL = dict(
    vocab_size=61, block_size=24, n_layer=1, n_head=2, n_embd=32, rope_theta=300.0,
    qk_norm=False, unit_embed=False,
)  # fmt: skip
ARCHITECTURES = {
    "llama": dict(n_kv_head=1),
    "smollm3": dict(nope_every=2, n_layer=2),
    "qwen3": dict(qk_norm=True),
    "gpt2": dict(norm="layernorm", mlp="gelu", pos="learned", bias=True),
    "embed_scale": dict(embed_scale=True, tie_embeddings=False, bias=True),
}
# name: whether documents are kept apart, gradient checkpointing, bf16 autocast, log p of each token
VARIANTS = {
    "plain": (False, False, False, False),
    "documents": (True, False, False, False),
    "checkpointing": (False, True, False, False),
    "bf16": (False, False, True, False),
    "per_token": (False, False, False, True),
    "all": (True, True, True, True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_gradients_equal_eager_ones(architecture, variant):
    keep_apart, grad_checkpoint, bf16, per_token = VARIANTS[variant]
    torch._dynamo.reset()
    model = GPT(GPTConfig(**SMALL | ARCHITECTURES[architecture]))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.grad_checkpoint = grad_checkpoint
    idx = torch.randint(61, (3, 24))
    targets = idx.roll(-1, 1)
    targets[:, ::5] = -1
    docs = documents(idx, 0) if keep_apart else None
    weights = torch.randn(3, 24)

    def loss_and_gradients(forward):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(idx, targets, docs, per_token=per_token)[1]
        loss = (loss * weights).sum() if per_token else loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    eager_loss, eager = loss_and_gradients(model)
    compiled_loss, compiled = loss_and_gradients(torch.compile(model, backend="aot_eager"))
    tolerance = 0.05 if bf16 else 1e-4
    assert compiled_loss == pytest.approx(eager_loss, rel=tolerance, abs=tolerance)
    for name, gradient in eager.items():
        assert gradient.norm() > 0, name
        difference = (compiled[name] - gradient).norm() / gradient.norm()
        assert difference < tolerance, f"{name}: gradients differ by {difference:.1e} of their norm"
