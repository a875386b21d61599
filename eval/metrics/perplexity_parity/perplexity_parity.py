"""How far one run's per-token log-likelihoods are from another's: a metric for `evaluate`.

    metric = evaluate.load("eval/metrics/perplexity_parity")
    metric.compute(predictions=log_likelihoods, references=log_likelihoods_of_dynamic_cache)

Runs offline and knows no model: the numbers may come from any two runs, on any two machines.
"""

# `evaluate` reads imports line by line: one on each.
import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Perplexity of two runs over the same tokens, and how far apart they are: the difference of their
losses per token, the largest difference, and the tokens at which another one becomes the likeliest.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: log-likelihoods (natural log) of every scored token, a list per document.
    references: the same tokens' in the run that counts as right, e.g. with DynamicCache.
    prediction_tokens, reference_tokens: the likeliest token at every place, lists of the same
        lengths; give both or none.
    reference_margins: at every place, how far the reference's largest logit is above the one of
        the prediction's token; with `rounding`, counts flips that are no rounding.
    rounding: margin up to which a flip is a rounding of the dtype.
    num_bytes: bytes of the scored text of all documents, for bits per byte.
    max_delta_nll: |delta_nll| at which is_parity becomes False; 1e-6 suits float32, 1e-3 bfloat16.
Returns:
    nll, reference_nll (nats per token), perplexity, reference_perplexity, delta_nll,
    mean_abs_delta_nll, max_abs_delta_nll, tokens, is_parity; with tokens: flips, flip_share; with
    margins: max_flip_margin, flips_beyond_rounding; with num_bytes: bits_per_byte.
Example:
    >>> metric = evaluate.load("eval/metrics/perplexity_parity")
    >>> metric.compute(predictions=[[-1.0, -2.0]], references=[[-1.0, -2.0]])["is_parity"]
    True
"""

_CITATION = ""


class PerplexityParity(evaluate.Metric):
    """Compare per-token log-likelihoods of two runs."""

    def _info(self):
        sequences = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": sequences, "references": sequences}),
        )

    def _compute(
        self,
        predictions,
        references,
        prediction_tokens=None,
        reference_tokens=None,
        reference_margins=None,
        rounding=None,
        num_bytes=None,
        max_delta_nll=1e-6,
    ):
        ours = _flat("predictions", predictions, references)
        theirs = _flat("references", references, references)
        deltas = theirs - ours
        nll, reference_nll = -ours.mean(), -theirs.mean()
        results = {
            "tokens": len(ours),
            "nll": float(nll),
            "reference_nll": float(reference_nll),
            "perplexity": float(np.exp(nll)),
            "reference_perplexity": float(np.exp(reference_nll)),
            "delta_nll": float(deltas.mean()),
            "mean_abs_delta_nll": float(np.abs(deltas).mean()),
            "max_abs_delta_nll": float(np.abs(deltas).max()),
        }
        is_parity = abs(results["delta_nll"]) <= max_delta_nll
        if (prediction_tokens is None) != (reference_tokens is None):
            raise ValueError("give both prediction_tokens= and reference_tokens=, or none of them")
        if prediction_tokens is not None:
            chosen = _flat("prediction_tokens", prediction_tokens, references)
            is_flip = chosen != _flat("reference_tokens", reference_tokens, references)
            results |= {"flips": int(is_flip.sum()), "flip_share": float(is_flip.mean())}
            if reference_margins is not None:
                margins = _flat("reference_margins", reference_margins, references)[is_flip]
                results["max_flip_margin"] = float(margins.max(initial=0.0))
                if rounding is not None:
                    results["flips_beyond_rounding"] = int((margins > rounding).sum())
                    is_parity = is_parity and results["flips_beyond_rounding"] == 0
        if num_bytes is not None:
            results["bits_per_byte"] = float(-ours.sum() / math.log(2) / num_bytes)
        return results | {"is_parity": bool(is_parity)}


def _flat(name, lists, references):
    """All documents' values in one array; raises ValueError if they are not the references'."""
    got, expected = [len(one) for one in lists], [len(one) for one in references]
    if got != expected or not sum(got):
        raise ValueError(
            f"{name}: got documents of {got} tokens, expected {expected}, as many as in references "
            "and at least one"
        )
    return np.concatenate([np.asarray(one) for one in lists])
