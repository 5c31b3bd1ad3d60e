"""Mutants that no test can notice, with the reason why the program means the same. They do not count.

A reason is for a line as it stands: change the line, and judge anew. `python -m tests.mutation` names those that match nothing.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "strategies/objectives/atkd.py",
        "rest = torch.where(nothing, 0.0, others).logsumexp(-1, keepdim=True)  # -inf alone has no gradient",
        "rest = torch.where(nothing, 1.0, others).logsumexp(-1, keepdim=True)  # -inf alone has no gradient",
    ): "replaced by -inf and by 0 where it is read",
    (
        "strategies/objectives/atkd.py",
        "return -torch.expm1(torch.where(column < outcomes, log_y, -torch.inf)).detach()",
        "return -(torch.expm1(torch.where(column < outcomes, log_y, -torch.inf)))",
    ): "only compared with a number, which passes no gradient",
    (
        "strategies/objectives/atkd.py",
        "return (by_nckd * torch.where(by_nckd != 0, nckd, 0.0) + by_tckd * torch.where(by_tckd != 0, tckd, 0.0)).sum()",
        "return (by_nckd * torch.where(by_nckd != 0, nckd, 0.0) + by_tckd * torch.where(by_tckd != 0, tckd, 1.0)).sum()",
    ): "what is replaced is multiplied by a weight of 0",
    (
        "strategies/objectives/base.py",
        "return (weights * torch.where(weights != 0, values, 0.0)).sum()",
        "return (weights * torch.where(weights != 0, values, 1.0)).sum()",
    ): "what is replaced is multiplied by a weight of 0",
    (
        "strategies/objectives/divergence.py",
        "return (weights * torch.where(weights != 0, log_p - log_q, 0.0)).sum(-1)",
        "return (weights * torch.where(weights != 0, log_p - log_q, 1.0)).sum(-1)",
    ): "what is replaced is multiplied by a weight of 0",
    (
        "strategies/objectives/features.py",
        "return (mine @ mine.T - theirs @ theirs.T).square().mean(-1)",
        "return (mine @ mine.T - theirs @ theirs.T).square().mean(-2)",
    ): "the matrix is symmetric",
    (
        "strategies/objectives/features.py",
        "for i, (mine, theirs) in enumerate(zip(self.taps.student, self.taps.teacher, strict=True)):",
        "for i, (mine, theirs) in enumerate(zip(self.taps.student, self.taps.teacher, strict=False)):",
    ): "both sides have the same length by construction",
    (
        "strategies/objectives/features.py",
        "rows = zip(student.tokens(mine).float().split(counts), teacher.tokens(theirs).detach().float().split(counts), strict=True)",
        "rows = zip(student.tokens(mine).float().split(counts), teacher.tokens(theirs).detach().float().split(counts), strict=False)",
    ): "both sides have the same length by construction",
    (
        "strategies/objectives/filtered.py",
        'total = total + (weights * hidden_mse(filters[f"student{i}"](student.tokens(mine)).float(), kept.float())).sum()',
        'total = total + (weights * hidden_mse(filters[f"student{i}"](student.tokens(mine)).float(), (kept))).sum()',
    ): "a narrower dtype beside float32 is widened exactly",
    (
        "strategies/objectives/measures.py",
        "shared = (theirs[:, :, None] == mine[:, None, :]).any(-1).float().mean(-1)",
        "shared = (theirs[:, :, None] == mine[:, None, :]).any(-2).float().mean(-1)",
    ): "both lists hold each id once, so those shared are as many seen from either side",
    (
        "strategies/objectives/preference.py",
        "weighed = torch.bincount(place, (weights != 0).double(), minlength=2 * len(numbers)).view(-1, 2)",
        "weighed = torch.bincount(place, (weights != 0).double(), minlength=0 * len(numbers)).view(-1, 2)",
    ): "every pair has a rejected row with tokens, so the last place is always counted",
    (
        "strategies/objectives/preference.py",
        "total = torch.bincount(place, weights.double(), minlength=2 * len(numbers)).view(-1, 2)",
        "total = torch.bincount(place, (weights), minlength=2 * len(numbers)).view(-1, 2)",
    ): "a pair has one weight, and its sum is exact in float32",
    (
        "strategies/objectives/preference.py",
        "return (slopes * torch.where(slopes != 0, outputs.label_logprobs(), 0.0)).sum()",
        "return (slopes * torch.where(slopes != 0, outputs.label_logprobs(), 1.0)).sum()",
    ): "what is replaced is multiplied by a weight of 0",
    (
        "strategies/objectives/relations.py",
        "for mine, theirs, scale in zip(self.taps.student, self.taps.teacher, scales, strict=True):",
        "for mine, theirs, scale in zip(self.taps.student, self.taps.teacher, scales, strict=False):",
    ): "both sides have the same length by construction",
    (
        "strategies/objectives/relations.py",
        "most, start = max(1, NUMBERS_AT_ONCE // (self.heads * length)), 0",
        "most, start = max(2, NUMBERS_AT_ONCE // (self.heads * length)), 0",
    ): "only how many tokens are taken at once",
    (
        "strategies/objectives/sampled.py",
        "return torch.where(weights != 0, advantage(teacher_label_logprobs(signal, outputs, reader), log_q), 0.0)",
        "return torch.where(weights != 0, advantage(teacher_label_logprobs(signal, outputs, reader), log_q), 1.0)",
    ): "what is replaced is multiplied by a weight of 0",
    (
        "strategies/objectives/token_weighting.py",
        "return torch.where(total > 0, live.sum() / torch.where(total > 0, total, 1.0), 0.0)",
        "return torch.where(total > 0, live.sum() / torch.where(total > 0, total, 2.0), 0.0)",
    ): "the outer choice takes 0 wherever the inner one takes this",
    (
        "strategies/objectives/transport.py",
        "ROUNDING = 64",
        "ROUNDING = 65",
    ): "a tolerance of rounding, whose last unit means nothing",
    (
        "strategies/signals.py",
        "log_p = self.teacher(outputs.logits.shape[-1], 1.0)",
        "log_p = self.teacher(outputs.logits.shape[-1], 2.0)",
    ): "a temperature keeps the order",
    (
        "strategies/objectives/atkd.py",
        'average = binary_p if direction == "forward" else binary_q',
        "average = binary_p if True else binary_q",
    ): "where one side has no other outcomes, the reverse divergence of the others is 0 by itself",
    (
        "strategies/objectives/taid.py",
        "change = (state.loss - loss) / (state.loss + 1e-15)",
        "change = (state.loss - loss) / (state.loss - 1e-15)",
    ): "a guard against division by 0, below the rounding of any loss",
}
