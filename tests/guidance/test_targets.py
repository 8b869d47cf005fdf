import torch

from clipkit.guidance.targets import alternatives, text_targets


def test_a_case_of_the_prompt_is_no_alternative_to_it():
    bank = ["a picture of a red rocket.", "One rocket!", "an orange rocket", "a red car", "a rocketry book"]
    assert alternatives("a photo of a rocket", bank) == ["a red car", "a rocketry book"]
    assert alternatives("a red, red rocket", bank) == bank[1:]
    assert alternatives("red", bank) == ["One rocket!", "an orange rocket", "a rocketry book"]


def test_targets_of_prompts_and_negative_prompts():
    """Each prompt among its negative captions and the negative prompts; then anything but the negative prompts."""
    words = ["red", "rocket", "cat", "dog"]

    def embed(texts):
        return torch.tensor([[float(word in text) for word in words] for text in texts])

    first, rest = text_targets(embed, ["a cat", "a red rocket"], {"a rocket": 0.5}, ["a dog"])
    assert (first.wanted.tolist(), first.weight) == ([[0, 1, 0, 0]], 0.5)
    assert first.others.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]  # not "a red rocket", which is a rocket
    assert rest.wanted.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert rest.others.tolist() == [[0, 0, 0, 1]]
    towards, away = text_targets(embed, [], {"a rocket": 2.0}, ["a dog"], dot=True)
    assert (towards.others, towards.weight, away.others, away.weight) == (None, 2.0, None, -1.0)
