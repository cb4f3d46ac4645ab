"""Reward functions for tests, named by the path of this file."""

import time


def letters(prompts, responses, columns):
    """The e's of an answer; the policy of a few steps writes some by chance."""
    if columns["copy"] != prompts:
        raise ValueError("the columns are those of other rows")
    return [response.count("e") for response in responses]


def taste(prompts, responses, columns):
    """Best at three e's: what `letters` pays for is good up to a point."""
    return [-abs(response.count("e") - 3) for response in responses]


def brevity(prompts, responses, columns):
    return [-len(response) / 10 for response in responses]


def constant(prompts, responses, columns):
    return [0.25] * len(responses)


def refuses(prompts, responses, columns):
    """Fails at every answer that is not empty, as those of the first check are."""
    if any(responses):
        raise RuntimeError("no answer is good enough")
    return [0.0] * len(responses)


def hang(prompts, responses, columns):
    if any(responses):
        time.sleep(600)
    return [0.0] * len(responses)


def two_arguments(prompts, responses):
    return [0.0] * len(responses)
