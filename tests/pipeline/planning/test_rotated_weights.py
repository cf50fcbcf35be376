"""Weights with a secret rotation in them: the same model, whatever the architecture does."""

import copy

import numpy as np
import pytest
import torch

from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.models import families
from pipeline.planning.rotated_weights import RotatedWeights
from tests.pipeline.oracles import FAMILIES, NUM_LAYERS, randomise

ROTATION = SecretRotation(bytes(range(32)), 64)


def exact(model):
    """A model in double precision, where transformers' RMSNorm rounds to float32."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        for name, norm in module.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                own = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon).double()
                own.load_state_dict(norm.state_dict())
                setattr(module, name, own)
    return model


def rotated(model):
    """The same model with rotated weights, and what it calls its norms replaced where need be."""
    base, family = model.base_model_prefix, model.config.model_type
    own = families.FAMILIES[family]
    tensors = {
        name.removeprefix("transformer."): tensor.detach().numpy()
        for name, tensor in model.state_dict().items()
    }
    weights = RotatedWeights(own.names, own.stream, ROTATION, np.dtype(np.float64))
    found = dict(weights.ends(tensors))
    for index in range(NUM_LAYERS):
        found |= weights.layer(tensors, index)
    model = copy.deepcopy(model)
    model.lm_head = torch.nn.Linear(
        64, model.config.vocab_size, bias="lm_head.bias" in found
    ).double()
    if family == "gpt2":
        for module in model.modules():
            for name, norm in module.named_children():
                if isinstance(norm, torch.nn.LayerNorm):
                    setattr(module, name, torch.nn.RMSNorm(64, norm.eps).double())
        found = {n if n.startswith("lm_head.") else f"{base}.{n}": t for n, t in found.items()}
    model.load_state_dict({name: torch.from_numpy(each.copy()) for name, each in found.items()})
    return model


@pytest.fixture(params=FAMILIES, scope="module")
def models(request):
    torch.manual_seed(0)
    model = exact(randomise(FAMILIES[request.param]()))
    return model, rotated(model)


@torch.no_grad()
def test_logits_in_double_precision_are_those_of_the_plain_weights(models):
    ids = torch.randint(3, 101, (2, 40), generator=torch.Generator().manual_seed(3))
    plain, other = (model(ids).logits for model in models)
    assert plain.abs().max() > 1
    assert (plain - other).abs().max() <= 1e-10


@torch.no_grad()
def test_hidden_rows_are_the_plain_ones_rotated(models):
    ids = torch.randint(3, 101, (1, 20), generator=torch.Generator().manual_seed(3))
    plain, other = (
        model(ids, output_hidden_states=True).hidden_states[2][0].numpy() for model in models
    )
    if models[0].config.model_type == "gpt2":
        plain = plain - plain.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(other, ROTATION.apply(plain), atol=1e-11)
    # not in the plain basis, nor in one that the plain rows show through
    cosines = (plain * other).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(other, axis=1)
    assert abs(cosines).max() < 0.7
