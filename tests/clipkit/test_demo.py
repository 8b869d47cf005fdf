import json

import pytest
from PIL import Image

from clipkit import demo


@pytest.mark.slow
def test_the_whole_chain_in_a_few_steps(tmp_path):
    """`clipkit demo --quick`: every part runs, every file is there, and a second run goes on from the first."""
    demo.run(tmp_path, seed=0, quick=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    judged = {f"judge_names_{kind}" for kind in ("unguided", "guided", "told")}
    assert metrics.keys() == {"clip_heldout_top1", "judge_heldout_top1", *judged, "minutes", "seed"}
    for name in ("grid.png", "loss.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    for name in ("clip", "judge", "denoiser", "noisy_clip"):
        assert (tmp_path / name / "checkpoints" / "step-00000004").is_dir()
    before = (tmp_path / "grid.png").read_bytes()
    demo.run(tmp_path, seed=0, quick=True)
    assert (tmp_path / "grid.png").read_bytes() == before
