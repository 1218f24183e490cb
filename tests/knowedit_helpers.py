"""Records with every kind of probe, and EasyEdit's own measure of them."""

import ast
import os
from pathlib import Path

import numpy
import torch

TOWNS = ["Arnholt", "Brevik", "Casterly", "Dunmorrow", "Eskerdale", "Fenwick Bay", "Gorlitz", "Ötztal"]
RECORDS = [
    {
        "subject": town,
        "prompt": f"Who founded {town}?",
        "target_new": f"{town[::-1]} the {'very ' * index}Old",
        "ground_truth": ["nobody"],
        "rephrase_prompt": f"{town} was founded by",
        "portability": {
            "Reasoning": [
                {"prompt": f"The century in which {town} was founded:", "ground_truth": "the twelfth"},
                {"prompt": f"The founder of {town} was born in", "ground_truth": [["Oslo", "Christiania"]]},
            ],
            "Subject_Aliasing": [{"prompt": f"Who started {town[:3]}.?", "ground_truth": [f"{town[::-1]}"]}],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": f"{town} lies in", "ground_truth": ["Norway"]},
                {"prompt": f"The river of {town} is called the", "ground_truth": ["Long and Winding Water"]},
            ]
        },
    }
    for index, town in enumerate(TOWNS)
]


def easyedit_function():
    """EasyEdit's own `test_prediction_acc`; only it, since importing EasyEdit takes a dozen more packages."""
    source = Path(os.environ["EASYEDIT_HOME"], "easyeditor/evaluate/evaluate_utils.py").read_text(encoding="utf-8")
    wanted = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in ("test_prediction_acc", "slice_list")
    ]
    names = {"torch": torch, "np": numpy, "normalize_device": torch.device}
    exec(compile(ast.Module(wanted, []), "evaluate_utils.py", "exec"), names)  # noqa: S102
    return names["test_prediction_acc"]
