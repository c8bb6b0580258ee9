//! The `peernix` program.

/// Large buffers come and go; the system's allocator gives their pages back to the kernel each time.
/// Off huge pages (`no_thp`), which made 16 MB resident at the start and served NARs no faster.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    peernix::cli::run()
}
