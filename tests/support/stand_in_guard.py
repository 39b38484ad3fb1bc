"""Stand-ins for Qwen3Guard-Stream: its streaming interface, a verdict that depends on the last ids alone."""

from __future__ import annotations

import torch

LEVELS = {0: "Safe", 1: "Unsafe", 2: "Controversial"}


def levels_of(ids):
    """Logits of the three levels after these ids."""
    return torch.tensor([(7 * ids[-1]) % 5 - 1.0, (3 * sum(ids[-3:])) % 4 - 1.0, len(ids) % 2 - 1.0])


class Streaming(torch.nn.Module):
    """Gives logits, as the model's own generator does; notes what it was fed."""

    response_risk_level_map = LEVELS
    device = "cpu"

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(5, 3)
        self.fed, self.closed = [], 0

    def stream_generate(self, token_ids):
        seen = token_ids.tolist()
        self.fed.append(seen)
        while True:
            risk = torch.zeros(1, len(token_ids), 3)
            risk[0, -1] = levels_of(seen)
            token_ids = yield risk, None, torch.full_like(risk, 9.0), None
            seen += token_ids.tolist()

    def close_stream(self, state):
        state.close()
        self.closed += 1


class InWords(torch.nn.Module):
    """Gives words and the winner's probability alone, as the documented method does."""

    device = "cpu"

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(5, 3)
        self.roles = []

    def stream_moderate_from_ids(self, token_ids, role, stream_state):
        seen = [*(stream_state or []), *token_ids.reshape(-1).tolist()]
        self.roles.append(role)
        probs = torch.softmax(levels_of(seen), dim=0)
        winner = int(probs.argmax())
        return {
            "risk_level": [LEVELS[winner]],
            "risk_prob": [round(float(probs[winner]), 2)],
            "category": ["None"],
        }, seen
