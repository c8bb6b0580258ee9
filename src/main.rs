//! The `peernix` program.

/// Large buffers come and go with each chunk of a NAR; the system's allocator gives their pages back to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    peernix::cli::run()
}
