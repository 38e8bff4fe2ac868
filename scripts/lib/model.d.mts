export declare function cacheDir(): string
export declare function modelPath(): string
export declare function fetchModel(
  say: (line: string) => void,
): Promise<{ path: string } | { missing: string }>
