"""Run as a program: load exported folders as a stranger would, and write what they compute beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main(root: Path) -> None:
    """Every folder of ``root`` holds ``model`` and ``question.pt``; its answer goes to ``answer.pt``."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in sorted(path.parent for path in root.glob("*/question.pt")):
        question = torch.load(folder / "question.pt")
        loader = getattr(transformers, question["loader"])
        network, information = loader.from_pretrained(folder / "model", output_loading_info=True)
        network.eval()
        with torch.no_grad():
            if question["head"] is None:
                values = network(**question["inputs"]).logits
            elif question["loader"] == "CLIPModel":
                tower = network.vision_model(**question["inputs"]).pooler_output
                values = network.visual_projection(tower)
            else:
                states = network(**question["inputs"]).last_hidden_state
                attended = question["inputs"]["attention_mask"][:, :, None]
                values = (states * attended).sum(dim=1) / attended.sum(dim=1)
            if question["head"] is not None:
                values = torch.nn.functional.normalize(values, dim=-1) @ question["head"].T
        named = list(network.named_parameters(remove_duplicate=False))
        ties = {}
        for name, parameter in named:
            ties.setdefault(parameter.data_ptr(), []).append(name)
        torch.save(
            {
                "logits": values,
                "problems": {key: sorted(map(str, found)) for key, found in information.items() if found},
                "ties": sorted(sorted(names) for names in ties.values() if len(names) > 1),
                "buffers": {name: buffer for name, buffer in network.named_buffers() if "running" in name},
                "dtype": str(network.dtype),
            },
            folder / "answer.pt",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
