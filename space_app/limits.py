"""What one visitor, and all of them together, may take."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits of the app.

    Attributes:
        file_bytes: of one file, also inside an archive. upload_bytes, upload_files: of one upload.
        archive_files, archive_bytes: of a zip file, unpacked. archive_ratio: bytes of one of its files per
            byte that it takes in the archive. pages: of a PDF.
        documents, tokens: of one library. piece_tokens: of a passage, the title line included.
        question_characters, answer_tokens, answer_seconds: of a question and its answer.
        questions_per_minute, uploads_per_minute: of one session. waiting: questions that may wait in all.
        comparison_tokens: of the prompt that caches are compared on. needle_tokens, needle_cpu_tokens: of the
            longest text that a fact is hidden in, on a GPU and on a CPU; needle_cells: facts of one test.
        trial_seconds: of one comparison or needle test; trials_per_minute: begun in one session; trials: that
            run at once in all.
        sessions: at once. disk_bytes: of all libraries together.
        idle_seconds: after which a session's hold on memory ends. keep_seconds: after which its library is
            removed.
    """

    file_bytes: int = 32 << 20
    upload_bytes: int = 64 << 20
    upload_files: int = 200
    archive_files: int = 2000
    archive_bytes: int = 96 << 20
    archive_ratio: int = 100
    pages: int = 3000
    documents: int = 2000
    tokens: int = 2_000_000
    piece_tokens: int = 128
    question_characters: int = 1000
    answer_tokens: int = 96
    answer_seconds: float = 600.0
    questions_per_minute: int = 20
    uploads_per_minute: int = 12
    waiting: int = 64
    comparison_tokens: int = 2048
    needle_tokens: int = 4_000_000
    needle_cpu_tokens: int = 1_000_000
    needle_cells: int = 60
    trial_seconds: float = 1800.0
    trials_per_minute: int = 6
    trials: int = 2
    sessions: int = 1000
    disk_bytes: int = 20 << 30
    idle_seconds: float = 1800.0
    keep_seconds: float = 7 * 86400.0

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{item.name} must be a number above 0; got {value!r}")
