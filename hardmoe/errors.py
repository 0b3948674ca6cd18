"""Every error that hardmoe raises on purpose.

    HardmoeError                 exit code 1: one sentence, with the offending value and the remedy
    ├── RecipeError              the recipe is missing, malformed or impossible
    ├── DataError                the user's data cannot be used (path, column, tags, sizes)
    ├── StorageError             a place cannot be read or written (missing, read-only, full)
    │   ├── MissingFileError     there is no such file
    │   └── StoreAwayError       a store did not answer, or was too busy, for as long as is waited for; a unit is tried again
    ├── ArtifactError            an artifact in the root is not what its record says
    │   ├── MissingRecordError   no record: the artifact does not exist (yet)
    │   ├── CorruptFileError     a file is truncated, altered or unreadable
    │   ├── SchemaError          a table has other columns or types than its readers expect
    │   ├── DriftError           built from another recipe than the one given, or by other versions
    │   └── RebuiltInputError    an input was rebuilt since, so what stands on it is stale
    ├── LeaseError               another process builds this artifact and ours lost it
    ├── PreemptedError           a unit was asked to make room, and did at a checkpoint; never reaches the user
    ├── WorkerLostError          a process that a unit needs died under it; tried again, and never reaches the user
    ├── StoppedError             exit code 130: 'hardmoe stop' asked this run to end; running again resumes
    ├── BackendError             the execution backend cannot start or cannot ever run what is asked
    └── UnitsFailedError         exit code 3: some units failed; running again resumes

Every exception takes exactly one message, so it survives the trip between worker processes; `ValueError` and
`AssertionError` are left for programming mistakes. Rejected: exceptions with structured constructor arguments, which
break on unpickling in Ray's workers.
"""


class HardmoeError(Exception):
    """An error the user can act on. `exit_code` is what the command line returns for it."""

    exit_code = 1


class RecipeError(HardmoeError):
    """The recipe is missing, malformed or asks for something impossible."""


class DataError(HardmoeError):
    """The user's data cannot be used as the recipe asks."""


class StorageError(HardmoeError):
    """A path or URI cannot be read or written."""


class MissingFileError(StorageError):
    """There is no such file."""


class StoreAwayError(StorageError):
    """A store did not answer, or only that it was too busy, for as long as it is waited for."""


class ArtifactError(HardmoeError):
    """An artifact in the run's root is not what its record says."""


class MissingRecordError(ArtifactError):
    """The artifact has no record, so it does not exist."""


class CorruptFileError(ArtifactError):
    """A file that a record vouches for is truncated, altered or unreadable."""


class SchemaError(ArtifactError):
    """A table has other columns or types than its readers expect."""


class DriftError(ArtifactError):
    """An artifact was built from another recipe than the one given, or the run was begun with other versions."""


class RebuiltInputError(ArtifactError):
    """An artifact's input was rebuilt since the artifact was made."""


class LeaseError(HardmoeError):
    """Another process holds the artifact, or took it over from us."""


class PreemptedError(HardmoeError):
    """A unit was asked to make room: it has made a checkpoint, and goes on from there elsewhere or later."""


class WorkerLostError(HardmoeError):
    """A process that a unit needs has died under it: the machine's failing, not the data's, so the unit is tried again."""


class StoppedError(HardmoeError):
    """Somebody asked this run to end; what it has is kept."""

    exit_code = 130


class BackendError(HardmoeError):
    """The execution backend cannot start, or can never satisfy what a unit asks for."""


class UnitsFailedError(HardmoeError):
    """Some units failed while the others finished; running the command again does only what is missing."""

    exit_code = 3
