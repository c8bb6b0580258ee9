# One file of 671 MB; a tree of 300 paths of 64 KiB to 20 MiB, 1.4 GB; 20,000 files of 3.5 kB in one path, and of 2 kB in another. What
# the yardstick of such NARs was measured with is not said, only what two other servers made of it. Their rates here, by themselves,
# next to nginx's, and next to their own for one large file, say 2.4 kB to more than 4, the middle of six answers 3.5.
let
  build = name: below: script: derivation {
    inherit name below;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" ''
      block=peernix-http-by-
      for i in 1 2 3 4 5 6 7 8 9 10 11 12; do block=$block$block; done
      blocks() { i=0; while [ $i -lt $1 ]; do printf %s "$block"; i=$((i+1)); done; }
      ${script}
    '' ];
  };
  sizes = [ 1 2 4 8 16 32 64 96 160 320 ];
  node = n: build "http-bench-middling-${toString n}"
    (map node (builtins.filter (m: m < 300) [ (2 * n + 1) (2 * n + 2) ]))
    "{ echo $below $name; blocks ${toString (builtins.elemAt sizes (n - n / 10 * 10))}; } > $out";
  files = name: size: build "http-bench-${name}" null ''
    line=peernix-http-by-
    while [ ''${#line} -lt ${toString size} ]; do line=$line$line; done
    folder=0
    while [ $folder -lt 200 ]; do
      /bin/mkdir -p $out/$folder
      file=0
      while [ $file -lt 100 ]; do
        printf '%.${toString size}s' "$folder $file $line" > $out/$folder/$file
        file=$((file+1))
      done
      folder=$((folder+1))
    done
  '';
in [
  (build "http-bench-large" null "blocks 10240 > $out")
  (node 0)
  (files "files" 3500)
  (files "short" 2000)
]
