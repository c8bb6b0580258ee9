# 5,700 paths of a few bytes, a tree by their references. `toFile` makes them in one evaluation, without a build for each.
let
  count = 5700;
  below = n: builtins.filter (m: m < count) [ (2 * n + 1) (2 * n + 2) ];
  path = n: builtins.toFile "http-bench-small-${toString n}"
    (toString ([ "peernix" n ] ++ map (builtins.elemAt paths) (below n)));
  paths = builtins.genList path count;
in builtins.head paths
