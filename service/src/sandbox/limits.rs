//! What a sandbox may use: one table of bounds, and the type that proves they were checked.

use sandbox_core::protocol::{IoLimits, Medium};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Kind, LogTail, change::RequestedChange, pool, request, request::Invalid, volume, words};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// The permitted values of one numeric field of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Bound {
    /// The field's dotted path in the request.
    pub field: &'static str,
    pub unit: &'static str,
    pub min: u64,
    /// Null: absent means no such limit, or what the field's description says.
    #[schema(required)]
    pub default: Option<u64>,
    pub max: u64,
}

const MEMORY_BYTES: Bound = Bound { field: "limits.memory_bytes", unit: "bytes", min: 8 * MIB, default: Some(256 * MIB), max: 4 * GIB };
const CPU_MILLIS: Bound = Bound { field: "limits.cpu_millis", unit: "thousandths of a core", min: 10, default: Some(1000), max: 64_000 };
const PIDS: Bound = Bound { field: "limits.pids", unit: "processes and threads", min: 1, default: Some(64), max: 4096 };
/// The default is for runs; a sandbox has no wall limit unless one is given.
const WALL_MS: Bound = Bound { field: "limits.wall_ms", unit: "milliseconds", min: 1, default: Some(10_000), max: 3_600_000 };
const CPU_MS: Bound = Bound { field: "limits.cpu_ms", unit: "milliseconds", min: 1, default: None, max: 3_600_000 };
const OUTPUT_BYTES: Bound = Bound { field: "limits.output_bytes", unit: "bytes", min: 0, default: Some(MIB), max: 64 * MIB };
const DISK_BYTES: Bound = Bound { field: "limits.disk_bytes", unit: "bytes", min: 64 * KIB, default: Some(64 * MIB), max: 64 * GIB };
const INODES: Bound = Bound { field: "limits.inodes", unit: "files, folders and links", min: 16, default: Some(4096), max: 1_000_000 };
const OPEN_FILES: Bound = Bound { field: "limits.open_files", unit: "descriptors of one process", min: 8, default: Some(256), max: 16_384 };
/// Without a value it is the sandbox's `disk_bytes`.
const FILE_SIZE_BYTES: Bound = Bound { field: "limits.file_size_bytes", unit: "bytes", min: 0, default: None, max: 64 * GIB };
/// Each of these holds for reading and, once more, for writing, and for each disk by itself.
const IO_BYTES_PER_S: Bound =
    Bound { field: "limits.io_bytes_per_s", unit: "bytes a second", min: 64 * KIB, default: Some(256 * MIB), max: 64 * GIB };
const IO_OPS_PER_S: Bound =
    Bound { field: "limits.io_ops_per_s", unit: "operations a second", min: 10, default: Some(20_000), max: 10_000_000 };

/// Of an exec; without a value it has none of its own.
pub(super) const EXEC_WALL_MS: Bound = Bound { default: None, ..WALL_MS };
pub(super) const EXEC_OUTPUT_BYTES: Bound = OUTPUT_BYTES;

/// Of a compile step: compilers need more than what they make.
const COMPILE_MEMORY_BYTES: Bound = Bound { field: "compile.limits.memory_bytes", default: Some(512 * MIB), ..MEMORY_BYTES };
const COMPILE_WALL_MS: Bound = Bound { field: "compile.limits.wall_ms", default: Some(30_000), ..WALL_MS };
/// No more than is stored: what a compiler says first is what counts.
const COMPILE_OUTPUT_BYTES: Bound =
    Bound { field: "compile.limits.output_bytes", unit: "bytes", min: 0, default: Some(64 * KIB), max: LogTail::STORED_BYTES as u64 };

/// Every bound that a request is held to.
pub fn bounds() -> [&'static Bound; 30] {
    [
        &MEMORY_BYTES,
        &CPU_MILLIS,
        &PIDS,
        &WALL_MS,
        &CPU_MS,
        &OUTPUT_BYTES,
        &DISK_BYTES,
        &INODES,
        &OPEN_FILES,
        &FILE_SIZE_BYTES,
        &IO_BYTES_PER_S,
        &IO_OPS_PER_S,
        &COMPILE_MEMORY_BYTES,
        &COMPILE_WALL_MS,
        &COMPILE_OUTPUT_BYTES,
        &request::WAIT_MS,
        &request::RETRY,
        &request::TTL_MS,
        &request::IDLE_TIMEOUT_MS,
        &request::STOP_GRACE_MS,
        &request::GRACE_MS,
        &request::TTY_ROWS,
        &request::TTY_COLUMNS,
        &request::UNTIL_MS,
        &request::LIST_LIMIT,
        &request::TAIL_LINES,
        &request::INTERVAL_MS,
        &volume::SIZE_BYTES,
        &pool::POOL_SIZE,
        &pool::READY_WITHIN_MS,
    ]
}

/// The bound of the field with this dotted path.
pub fn bound_of(field: &str) -> Option<&'static Bound> {
    bounds().into_iter().find(|bound| bound.field == field)
}

impl Bound {
    /// `value` if it is within the bound.
    pub fn check(&'static self, value: u64) -> Result<u64, Invalid> {
        if (self.min..=self.max).contains(&value) {
            return Ok(value);
        }
        Err(Invalid::out_of(self, value))
    }

    fn check_or_default(&'static self, value: Option<u64>) -> Result<Option<u64>, Invalid> {
        value.map(|value| self.check(value)).transpose().map(|value| value.or(self.default))
    }

    fn check_or(&'static self, value: Option<u64>, default: u64) -> Result<u64, Invalid> {
        value.map_or(Ok(default), |value| self.check(value))
    }
}

/// Limits as a request names them; every one may be absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(
    description = "Absent ones get their default, or the largest value that the caller's quotas permit if that is less. Out of range is an error, never clamped."
)]
pub struct RequestedLimits {
    #[schema(extensions(("x-bound" = json!(MEMORY_BYTES))))]
    memory_bytes: Option<u64>,
    /// Thousandths of a core.
    #[schema(extensions(("x-bound" = json!(CPU_MILLIS))))]
    cpu_millis: Option<u64>,
    /// Processes and threads at one time.
    #[schema(extensions(("x-bound" = json!(PIDS))))]
    pids: Option<u64>,
    /// Real time. Default of a run: 10000; of a sandbox: none.
    #[schema(extensions(("x-bound" = json!(Bound { default: None, ..WALL_MS }))))]
    wall_ms: Option<u64>,
    /// CPU time of all processes together. Absent, there is no such limit.
    #[schema(extensions(("x-bound" = json!(CPU_MS))))]
    cpu_ms: Option<u64>,
    /// Of stdout, and as many of stderr.
    #[schema(extensions(("x-bound" = json!(OUTPUT_BYTES))))]
    output_bytes: Option<u64>,
    /// Of the writable layer. Up to `memory_bytes` it is kept in memory, and what is in it counts as memory. A larger one is kept on the node's disk, with
    /// its space set aside before the start, which then takes some 20 ms longer.
    #[schema(extensions(("x-bound" = json!(DISK_BYTES))))]
    disk_bytes: Option<u64>,
    /// Files, folders and links of the writable layer. On disk at most 16384, and one more for every 8 KiB.
    #[schema(extensions(("x-bound" = json!(INODES))))]
    inodes: Option<u64>,
    /// Descriptors of one process.
    #[schema(extensions(("x-bound" = json!(OPEN_FILES))))]
    open_files: Option<u64>,
    /// Of one file. Absent, it is `disk_bytes`.
    #[schema(extensions(("x-bound" = json!(FILE_SIZE_BYTES))))]
    file_size_bytes: Option<u64>,
    /// How fast it may read from the node's disks, and once more how fast it may write to them, in bytes a second; for each disk.
    #[schema(extensions(("x-bound" = json!(IO_BYTES_PER_S))))]
    io_bytes_per_s: Option<u64>,
    /// As `io_bytes_per_s`, in operations a second.
    #[schema(extensions(("x-bound" = json!(IO_OPS_PER_S))))]
    io_ops_per_s: Option<u64>,
}

impl RequestedLimits {
    /// These, and the other's where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.or(other.memory_bytes),
            cpu_millis: self.cpu_millis.or(other.cpu_millis),
            pids: self.pids.or(other.pids),
            wall_ms: self.wall_ms.or(other.wall_ms),
            cpu_ms: self.cpu_ms.or(other.cpu_ms),
            output_bytes: self.output_bytes.or(other.output_bytes),
            disk_bytes: self.disk_bytes.or(other.disk_bytes),
            inodes: self.inodes.or(other.inodes),
            open_files: self.open_files.or(other.open_files),
            file_size_bytes: self.file_size_bytes.or(other.file_size_bytes),
            io_bytes_per_s: self.io_bytes_per_s.or(other.io_bytes_per_s),
            io_ops_per_s: self.io_ops_per_s.or(other.io_ops_per_s),
        }
    }
}

/// Limits of a compile step as a request names them; every one may be absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(
    description = "Limits of a compile step, apart from those of its run. The writable layer is one for both: its size is the run's. Absent ones get their default, or the largest value \
                   that the caller's quotas permit if that is less."
)]
pub struct RequestedCompileLimits {
    #[schema(extensions(("x-bound" = json!(COMPILE_MEMORY_BYTES))))]
    memory_bytes: Option<u64>,
    /// Thousandths of a core.
    #[schema(extensions(("x-bound" = json!(CPU_MILLIS))))]
    cpu_millis: Option<u64>,
    /// Processes and threads at one time.
    #[schema(extensions(("x-bound" = json!(PIDS))))]
    pids: Option<u64>,
    /// Real time.
    #[schema(extensions(("x-bound" = json!(COMPILE_WALL_MS))))]
    wall_ms: Option<u64>,
    /// CPU time of all processes together. Absent, there is no such limit.
    #[schema(extensions(("x-bound" = json!(CPU_MS))))]
    cpu_ms: Option<u64>,
    /// Of stdout, and as many of stderr; what comes after is dropped.
    #[schema(extensions(("x-bound" = json!(COMPILE_OUTPUT_BYTES))))]
    output_bytes: Option<u64>,
    /// Descriptors of one process.
    #[schema(extensions(("x-bound" = json!(OPEN_FILES))))]
    open_files: Option<u64>,
    /// Of one file. Absent, it is the run's `disk_bytes`.
    #[schema(extensions(("x-bound" = json!(FILE_SIZE_BYTES))))]
    file_size_bytes: Option<u64>,
    /// As that of a run.
    #[schema(extensions(("x-bound" = json!(IO_BYTES_PER_S))))]
    io_bytes_per_s: Option<u64>,
    /// As that of a run.
    #[schema(extensions(("x-bound" = json!(IO_OPS_PER_S))))]
    io_ops_per_s: Option<u64>,
}

impl From<RequestedCompileLimits> for RequestedLimits {
    fn from(asked: RequestedCompileLimits) -> Self {
        let RequestedCompileLimits { memory_bytes, cpu_millis, pids, wall_ms, cpu_ms, output_bytes, open_files, file_size_bytes, .. } =
            asked;
        let RequestedCompileLimits { io_bytes_per_s, io_ops_per_s, .. } = asked;
        Self {
            memory_bytes,
            cpu_millis,
            pids,
            wall_ms,
            cpu_ms,
            output_bytes,
            disk_bytes: None,
            inodes: None,
            open_files,
            file_size_bytes,
            io_bytes_per_s,
            io_ops_per_s,
        }
    }
}

/// The limits in force. Holding them proves that every bound was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(description = "The limits in force.")]
pub struct Limits {
    memory_bytes: u64,
    cpu_millis: u64,
    pids: u64,
    #[schema(required)]
    wall_ms: Option<u64>,
    #[schema(required)]
    cpu_ms: Option<u64>,
    output_bytes: u64,
    disk_bytes: u64,
    inodes: u64,
    open_files: u64,
    file_size_bytes: u64,
    #[serde(default = "io_bytes_per_s")]
    #[schema(required)]
    io_bytes_per_s: u64,
    #[serde(default = "io_ops_per_s")]
    #[schema(required)]
    io_ops_per_s: u64,
    /// Where the writable layer is kept.
    #[serde(default = "in_memory")]
    #[schema(required, value_type = words::Medium)]
    disk_medium: Medium,
}

const fn io_bytes_per_s() -> u64 {
    256 * MIB
}

const fn io_ops_per_s() -> u64 {
    20_000
}

const fn in_memory() -> Medium {
    Medium::Memory
}

impl Limits {
    /// Checks what was asked for and fills in the defaults of a sandbox of this kind.
    pub fn of(kind: Kind, asked: RequestedLimits) -> Result<Self, Invalid> {
        let memory_bytes = MEMORY_BYTES.check_or(asked.memory_bytes, 256 * MIB)?;
        let disk_bytes = DISK_BYTES.check_or(asked.disk_bytes, 64 * MIB)?;
        let inodes = INODES.check_or(asked.inodes, 4096)?;
        // What is larger than all its memory cannot be kept there.
        let disk_medium = if disk_bytes > memory_bytes { Medium::Disk } else { Medium::Memory };
        if disk_medium == Medium::Disk {
            check_inodes_on_disk(inodes, disk_bytes)?;
        }
        Ok(Self {
            memory_bytes,
            cpu_millis: CPU_MILLIS.check_or(asked.cpu_millis, 1000)?,
            pids: PIDS.check_or(asked.pids, 64)?,
            wall_ms: match kind {
                Kind::Run => WALL_MS.check_or_default(asked.wall_ms)?,
                Kind::Sandbox | Kind::Pooled => asked.wall_ms.map(|ms| WALL_MS.check(ms)).transpose()?,
            },
            cpu_ms: CPU_MS.check_or_default(asked.cpu_ms)?,
            output_bytes: OUTPUT_BYTES.check_or(asked.output_bytes, MIB)?,
            disk_bytes,
            inodes,
            open_files: OPEN_FILES.check_or(asked.open_files, 256)?,
            file_size_bytes: FILE_SIZE_BYTES.check_or(asked.file_size_bytes, disk_bytes)?,
            io_bytes_per_s: IO_BYTES_PER_S.check_or(asked.io_bytes_per_s, io_bytes_per_s())?,
            io_ops_per_s: IO_OPS_PER_S.check_or(asked.io_ops_per_s, io_ops_per_s())?,
            disk_medium,
        })
    }

    /// Those of a run and of the compile step before it, if there is one. Both have one writable layer, which is as large as the run's, and on disk where either has too
    /// little memory for it.
    pub fn of_steps(run: RequestedLimits, compile: Option<RequestedLimits>) -> Result<(Self, Option<Self>), Invalid> {
        let mut run = Self::of(Kind::Run, run)?;
        let Some(asked) = compile else { return Ok((run, None)) };
        let asked = RequestedLimits {
            memory_bytes: COMPILE_MEMORY_BYTES.check_or_default(asked.memory_bytes)?,
            wall_ms: COMPILE_WALL_MS.check_or_default(asked.wall_ms)?,
            output_bytes: COMPILE_OUTPUT_BYTES.check_or_default(asked.output_bytes)?,
            disk_bytes: Some(run.disk_bytes),
            // Of the layer, not of this step.
            inodes: None,
            ..asked
        };
        let mut compile =
            Self::of(Kind::Run, asked).map_err(|invalid| Invalid { field: format!("compile.{}", invalid.field), ..invalid })?;
        compile.inodes = run.inodes;
        if [run.disk_medium, compile.disk_medium].contains(&Medium::Disk) {
            check_inodes_on_disk(run.inodes, run.disk_bytes)?;
            (run.disk_medium, compile.disk_medium) = (Medium::Disk, Medium::Disk);
        }
        Ok((run, Some(compile)))
    }

    /// These with what was asked for in their place.
    pub(super) fn changed(mut self, asked: RequestedChange) -> Result<Self, Invalid> {
        self.memory_bytes = MEMORY_BYTES.check_or(asked.memory_bytes, self.memory_bytes)?;
        self.cpu_millis = CPU_MILLIS.check_or(asked.cpu_millis, self.cpu_millis)?;
        self.pids = PIDS.check_or(asked.pids, self.pids)?;
        self.wall_ms = asked.wall_ms.map(|ms| WALL_MS.check(ms)).transpose()?.or(self.wall_ms);
        self.cpu_ms = asked.cpu_ms.map(|ms| CPU_MS.check(ms)).transpose()?.or(self.cpu_ms);
        self.io_bytes_per_s = IO_BYTES_PER_S.check_or(asked.io_bytes_per_s, self.io_bytes_per_s)?;
        self.io_ops_per_s = IO_OPS_PER_S.check_or(asked.io_ops_per_s, self.io_ops_per_s)?;
        Ok(self)
    }

    /// What holds an exec: its own where it has some, and its sandbox's.
    #[must_use]
    pub const fn of_exec(&self, wall_ms: Option<u64>, output_bytes: u64) -> Self {
        Self { wall_ms, output_bytes, cpu_ms: None, ..*self }
    }

    pub const fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    pub const fn cpu_millis(&self) -> u64 {
        self.cpu_millis
    }

    pub const fn pids(&self) -> u64 {
        self.pids
    }

    pub const fn wall_ms(&self) -> Option<u64> {
        self.wall_ms
    }

    pub const fn cpu_ms(&self) -> Option<u64> {
        self.cpu_ms
    }

    pub const fn output_bytes(&self) -> u64 {
        self.output_bytes
    }

    pub const fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    pub const fn inodes(&self) -> u64 {
        self.inodes
    }

    pub const fn open_files(&self) -> u64 {
        self.open_files
    }

    pub const fn file_size_bytes(&self) -> u64 {
        self.file_size_bytes
    }

    pub const fn io(&self) -> IoLimits {
        IoLimits { bytes_per_s: self.io_bytes_per_s, ops_per_s: self.io_ops_per_s }
    }

    /// Where the writable layer is kept.
    pub const fn disk_medium(&self) -> Medium {
        self.disk_medium
    }
}

fn check_inodes_on_disk(inodes: u64, disk_bytes: u64) -> Result<(), Invalid> {
    let inodes_max = 16_384 + disk_bytes / (8 * KIB);
    if inodes > inodes_max {
        let detail = format!("{inodes} are too many for {}: on disk at most {inodes_max}", bytes_for_people(disk_bytes));
        return Err(Invalid::new(INODES.field, detail));
    }
    Ok(())
}

/// A number of bytes for people: in the largest unit that it is a whole number of.
pub(super) fn bytes_for_people(bytes: u64) -> String {
    [(GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit))
        .map_or_else(|| format!("{bytes} bytes"), |(unit, name)| format!("{} {name}", bytes / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_limits_gets_the_tables_defaults() {
        let limits = Limits::of(Kind::Run, RequestedLimits::default()).unwrap();
        assert_eq!(Some(limits.memory_bytes()), MEMORY_BYTES.default);
        assert_eq!(Some(limits.cpu_millis()), CPU_MILLIS.default);
        assert_eq!(Some(limits.pids()), PIDS.default);
        assert_eq!(limits.wall_ms(), WALL_MS.default);
        assert_eq!(limits.cpu_ms(), None);
        assert_eq!(Some(limits.output_bytes()), OUTPUT_BYTES.default);
        assert_eq!(Some(limits.disk_bytes()), DISK_BYTES.default);
        assert_eq!(Some(limits.inodes()), INODES.default);
        assert_eq!(Some(limits.open_files()), OPEN_FILES.default);
        assert_eq!(limits.file_size_bytes(), limits.disk_bytes());
    }

    #[test]
    fn a_layer_larger_than_memory_is_kept_on_disk_with_as_many_inodes_as_it_can_have() {
        let of = |memory_bytes, disk_bytes, inodes| {
            let asked = RequestedLimits { memory_bytes: Some(memory_bytes), disk_bytes: Some(disk_bytes), inodes, ..Default::default() };
            Limits::of(Kind::Run, asked)
        };
        assert_eq!(of(64 * MIB, 64 * MIB, None).unwrap().disk_medium(), Medium::Memory);
        assert_eq!(of(64 * MIB, 64 * MIB + 1, None).unwrap().disk_medium(), Medium::Disk);
        assert_eq!(of(64 * MIB, 128 * MIB, Some(32_768)).unwrap().inodes(), 32_768);
        assert_eq!(of(64 * MIB, 128 * MIB, Some(32_769)).unwrap_err().field, "limits.inodes");
    }

    #[test]
    fn a_compile_step_has_limits_of_its_own_on_the_runs_layer() {
        let asked = RequestedLimits { memory_bytes: Some(128 * MIB), wall_ms: Some(5), inodes: Some(100), ..Default::default() };
        let (run, compile) = Limits::of_steps(asked, Some(RequestedLimits { pids: Some(7), ..Default::default() })).unwrap();
        let compile = compile.unwrap();
        assert_eq!((run.memory_bytes(), run.wall_ms(), run.pids(), run.disk_medium()), (128 * MIB, Some(5), 64, Medium::Memory));
        assert_eq!((compile.memory_bytes(), compile.wall_ms(), compile.pids()), (512 * MIB, Some(30_000), 7));
        assert_eq!((compile.output_bytes(), compile.inodes(), compile.disk_bytes()), (64 * KIB, 100, run.disk_bytes()));
        assert_eq!(Limits::of_steps(asked, None), Ok((run, None)));
    }

    #[test]
    fn the_layer_of_both_is_where_the_one_with_less_memory_has_it() {
        let of = |memory_bytes, step_memory_bytes, inodes| {
            let run = RequestedLimits { memory_bytes: Some(memory_bytes), inodes, ..Default::default() };
            Limits::of_steps(run, Some(RequestedLimits { memory_bytes: Some(step_memory_bytes), ..Default::default() }))
                .map(|(run, compile)| (run.disk_medium(), compile.unwrap().disk_medium()))
        };
        assert_eq!(of(64 * MIB, 64 * MIB, None), Ok((Medium::Memory, Medium::Memory)));
        assert_eq!(of(32 * MIB, 64 * MIB, None), Ok((Medium::Disk, Medium::Disk)));
        assert_eq!(of(64 * MIB, 32 * MIB, None), Ok((Medium::Disk, Medium::Disk)));
        assert!(of(64 * MIB, 64 * MIB, Some(100_000)).is_ok());
        assert_eq!(of(64 * MIB, 32 * MIB, Some(100_000)).unwrap_err().field, "limits.inodes");
    }

    #[test]
    fn what_a_compile_step_cannot_have_is_named_as_its_own() {
        let fault = |asked: RequestedLimits| Limits::of_steps(RequestedLimits::default(), Some(asked)).unwrap_err();
        assert_eq!(fault(RequestedLimits { pids: Some(0), ..Default::default() }).field, "compile.limits.pids");
        let output = fault(RequestedLimits { output_bytes: Some(MIB), ..Default::default() });
        assert_eq!((output.field.as_str(), output.bound), ("compile.limits.output_bytes", Some(&COMPILE_OUTPUT_BYTES)));
    }

    #[test]
    fn a_sandbox_has_no_wall_limit_unless_given() {
        let none = Limits::of(Kind::Sandbox, RequestedLimits::default()).unwrap();
        assert_eq!(none.wall_ms(), None);
        let some = Limits::of(Kind::Sandbox, RequestedLimits { wall_ms: Some(5), ..Default::default() }).unwrap();
        assert_eq!(some.wall_ms(), Some(5));
    }

    #[test]
    fn a_value_below_the_least_names_field_and_bound() {
        let error = Limits::of(Kind::Run, RequestedLimits { memory_bytes: Some(8 * MIB - 1), ..Default::default() }).unwrap_err();
        assert_eq!(error.field, "limits.memory_bytes");
        assert_eq!(error.bound, Some(&MEMORY_BYTES));
    }

    #[test]
    fn both_ends_of_a_bound_are_inside_it() {
        assert_eq!(PIDS.check(1), Ok(1));
        assert_eq!(PIDS.check(4096), Ok(4096));
        assert!(PIDS.check(4097).is_err());
    }

    #[test]
    fn bytes_are_shown_in_the_largest_whole_unit() {
        assert_eq!(bytes_for_people(64 * MIB), "64 MiB");
        assert_eq!(bytes_for_people(4 * GIB), "4 GiB");
        assert_eq!(bytes_for_people(1500), "1500 bytes");
    }
}
