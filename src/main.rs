//! The `peernix` program.

fn main() -> std::process::ExitCode {
    peernix::cli::run()
}
