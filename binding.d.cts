/** What loading the native file came to. */
export interface Loaded {
  /** Exports of the native file, or null. */
  readonly binding: unknown
  /** The file that was loaded, or null. */
  readonly path: string | null
  /** `platform-arch`, and the C library on Linux. */
  readonly platform: string
  /** What failed before, in order. */
  readonly tried: readonly { readonly path: string; readonly why: string }[]
  /** Version of this package. */
  readonly version: string
}
export declare function load(): Loaded
export declare const PACKAGES: Readonly<Record<string, string>>
