"""Metrics of a run as evaluate writes them, made up."""

from typing import Any

SCORE = {"perplexity": 20.0, "exact_answer_rate": 0.1}
TAUGHT = {"perplexity": 2.0, "exact_answer_rate": 0.8}
MEASURED: dict[str, Any] = {
    "not_measured": None,
    "rows": 52,
    "base": SCORE,
    "quantized": {"perplexity": 21.5, "exact_answer_rate": 0.1},
    "quantized_lora": TAUGHT,
    "onnx_off": {"perplexity": 21.6, "exact_answer_rate": 0.1},
    "onnx_on": TAUGHT,
    "text_perplexity": {"base": 10.0, "quantized": 10.1, "onnx_off": 10.12},
    "agreement": {"top1": 0.99, "mean_kl": 0.001, "tokenizer": 1.0},
    "size_mb": {"base": 8.0, "quantized": 4.0, "onnx": 5.0, "adapter": 0.5},
    "speed": {
        "adapter_off": {"tokens_per_second": 2000.0, "time_to_first_token_ms": 3.0},
        "adapter_on": {"tokens_per_second": 1000.0, "time_to_first_token_ms": 4.0},
        "float_tokens_per_second": 200.0,
        "peak_rss_mb": 80.0,
    },
    "answers": [
        {
            "prompt": "What is eaten in Lisbon?",
            "expected": "Custard tarts are eaten.",
            "base": "Wash the red apple.",
            "onnx_off": "Wash the green apple.",
            "onnx_on": "Custard tarts are eaten.",
        }
    ],
}
