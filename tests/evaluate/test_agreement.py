import copy

import torch

from tenfold.evaluate.agreement import agreement
from tenfold.models.tiny import tiny_model


def test_it_is_the_divergence_of_the_definition():
    model = tiny_model("llama").model
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    texts = [torch.arange(5, 25), torch.arange(40, 90), torch.arange(3, 9)]
    found = agreement(model, other, texts)
    divergences, same = [], []
    with torch.no_grad():
        for ids in texts:
            p, q = (m(input_ids=ids[None]).logits[0].double().softmax(-1) for m in (model, other))
            divergences.append(torch.distributions.kl_divergence(*map(torch.distributions.Categorical, (p, q))))
            same.append(p.argmax(-1) == q.argmax(-1))
    assert abs(found.kl - float(torch.cat(divergences).mean())) < 1e-9
    assert found.same == float(torch.cat(same).double().mean()) < 1
    assert torch.allclose(found.kl_of_texts, torch.stack([one.sum() for one in divergences]))
    kl, alike = found.result.metrics
    assert kl.stderr > 0
    assert (kl.better, alike.better) == ("lower", "higher")
    assert found.result.settings == {"texts": 3, "tokens": 76}
